"""Machine instructions per element on the hot path of a row-resident register kernel.

The kernel's loops over a thread's columns are unrolled, so there is no loop to count. The hot path
of one row is found instead as the shortest way through the control flow that passes all code of the
two sweeps: the blocks that evaluate exponentials of loaded logits, and those with the gradient's
16-byte stores. Whatever else lies on that way (barriers, the exchange, factors) is counted apart.
"""

from __future__ import annotations

import heapq
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS_PER_THREAD = 32  # kColumnsPerThread in csrc/cuda/policy.h

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass
class Block:
    """Instructions without a jump in or out; `after` are the addresses where it may go on."""

    start: int
    code: list[str] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.code)


def nvcc_command(arch: str) -> list[str]:
    """nvcc for one architecture, with the flags of setup.py, printing ptxas's report."""
    compiler = os.environ.get("NVCC") or shutil.which("nvcc") or "nvcc"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-DNDEBUG", f'-DKDKERNELS_CUDA_ARCHS="{arch}"']
    return [compiler, *flags, f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]


def find_cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def disassemble(cuobjdump: str, cubin: str) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of each kernel in a file."""
    text = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True).stdout
    kernels: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in text.splitlines():
        if "Function :" in line:
            current = kernels.setdefault(line.split(":", 1)[1].strip(), [])
        elif match := _LINE.match(line):
            current.append((int(match[1], 16), match[2].strip()))
    return kernels


def _jump(code: str) -> tuple[list[int], bool]:
    """(addresses a jump may take, whether the next instruction may follow it)."""
    words = code.split()
    conditional = words[0].startswith("@") or "BRA.DIV" in code or "BRA.U.ANY" in code
    operation = words[1] if words[0].startswith("@") else words[0]
    if operation == "EXIT":
        return [], conditional
    if not operation.startswith("BRA") or "BRA.DIV" in code:  # the divergent way is never hot
        return [], True
    operands = code[code.index("BRA") :]
    more = re.search(r"BRA\S*\s+!?U?P\d", operands)
    target = _TARGET.search(operands)
    return ([int(target[1], 16)] if target else []), conditional or bool(more)


def blocks_of(code: list[tuple[int, str]]) -> dict[int, Block]:
    following = {a: b for (a, _), (b, _) in zip(code, code[1:], strict=False)}
    heads = {code[0][0]}
    for address, text in code:
        targets, falls = _jump(text)
        if targets or not falls:
            heads.update(targets)
            if address in following:
                heads.add(following[address])
    blocks: dict[int, Block] = {}
    block = Block(code[0][0])
    for address, text in code:
        if address in heads:
            if block.code and not block.after and _jump(block.code[-1])[1]:
                block.after = [address]
            block = blocks.setdefault(address, Block(address))
        block.code.append(text)
        targets, falls = _jump(text)
        if targets or not falls:
            block.after = targets + ([following[address]] if falls and address in following else [])
    return blocks


def _shortest(blocks: dict[int, Block], start: int, goal: int) -> list[int]:
    """The cheapest way from the end of `start` to `goal`, as blocks without `start`."""
    queue = [(0, start, [])]
    seen = set()
    while queue:
        cost, at, way = heapq.heappop(queue)
        if at == goal and way:
            return way
        if at in seen:
            continue
        seen.add(at)
        for after in blocks[at].after:
            if after in blocks:
                heapq.heappush(queue, (cost + len(blocks[after].code), after, [*way, after]))
    raise ValueError("no way")


@dataclass
class HotPath:
    """Instructions of one thread for one row of 32 columns."""

    sweeps: int  # blocks of the loops over columns
    between: int
    special: int  # MUFU on the whole path

    def per_element(self) -> tuple[float, float, float]:
        n = COLUMNS_PER_THREAD
        return self.sweeps / n, (self.sweeps + self.between) / n, self.special / n


def hot_path(code: list[tuple[int, str]]) -> HotPath:
    """Of a register kernel."""
    blocks = blocks_of(code)
    order = sorted(blocks)
    stores = [a for a in order if blocks[a].count(r"STG\.E\.EF\.128")]
    observed = [a for a in order if blocks[a].count(r"MUFU\.EX2") >= 8]
    # The rare second sums have their own copies; the first run of each kind is the hot one.
    vectors = 8 if _is_float32(code) else 4
    observed = observed[:vectors]
    stores = [a for a in stores if a > observed[-1]]
    stores = stores[-vectors - 1 : -1] if len(stores) > vectors else stores[:vectors]
    maxima = [a for a in order if a < observed[0] and blocks[a].count(r"HMNMX2|FMNMX") >= 16]
    required = [*maxima[-1:], *observed, *stores]
    way = [required[0]]
    for goal in required[1:]:
        way += _shortest(blocks, way[-1], goal)
    way += _shortest(blocks, way[-1], required[0])[:-1]
    inside = _column_blocks(way, observed, stores, maxima)
    lines = {a: len(blocks[a].code) for a in way}
    sweeps = sum(lines[a] for a in way if a in inside)
    special = sum(blocks[a].count("MUFU") for a in way)
    return HotPath(sweeps, sum(lines[a] for a in way) - sweeps, special)


def _column_blocks(way: list[int], observed: list[int], stores: list[int], maxima: list[int]) -> set[int]:
    """The blocks of the path that lie within a sweep."""
    first, last = way.index(observed[0]), way.index(observed[-1])
    begin, end = way.index(stores[0]), way.index(stores[-1])
    return {*maxima[-1:], *way[first : last + 1], *way[begin - 2 : end + 1]}


def _is_float32(code: list[tuple[int, str]]) -> bool:
    return not any("F2FP" in text for _, text in code)
