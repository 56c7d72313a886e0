"""Read NVIDIA machine code without a GPU: registers, spills and what the innermost loops hold.

The disassembler comes with Triton or the CUDA toolkit. A loop is a backward branch; the loops that
count are the innermost ones that read logits, so that code which runs once per row is not taken for
a loop over the vocabulary.

The CUDA register kernels unroll their loops over a thread's columns: their only loop is over rows,
and counting that would count all code that rarely runs. :func:`hot_path` finds the hot path of a
row instead, as the shortest way through the control flow that passes the sweeps of a warp that has
nothing special among its columns: the block that evaluates exponentials, the one that finds the
next row's largest logits, and the one with the gradient's 16-byte stores. Whatever else lies on
that way (barriers, the exchange, factors) is counted apart.
"""

from __future__ import annotations

import collections
import heapq
import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TEXT = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_RESOURCES = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WIDTHS = ((".256", 32), (".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1))


@dataclass
class Loop:
    """Instructions of one loop, by what they are."""

    instructions: int = 0
    mufu: int = 0
    float32: int = 0
    barriers: int = 0
    shuffles: int = 0
    shared: int = 0
    spills: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    loads: collections.Counter[int] = field(default_factory=collections.Counter)  # by bits
    stores: collections.Counter[int] = field(default_factory=collections.Counter)

    def add(self, opcode: str) -> None:
        base = opcode.split(".")[0]
        if base == "NOP":
            return
        self.instructions += 1
        if base in ("LDG", "LDGSTS"):
            width = width_of(opcode)
            self.loads[8 * width] += 1
            self.load_bytes += width
        elif base == "STG":
            width = width_of(opcode)
            self.stores[8 * width] += 1
            self.store_bytes += width
        self.mufu += base == "MUFU"
        self.float32 += base in _FLOAT32
        self.barriers += base == "BAR"
        self.shuffles += base in ("SHFL", "REDUX", "CREDUX")
        self.shared += base in ("LDS", "STS", "LDSM", "ATOMS")
        self.spills += base in ("LDL", "STL")


_FLOAT32 = frozenset(
    {"FADD", "FMUL", "FFMA", "FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "FCHK"}
    | {"FADD2", "FMUL2", "FFMA2"}
)


@dataclass
class Kernel:
    """One function of a cubin."""

    name: str
    registers: int
    stack: int
    whole: Loop  # all of its instructions
    loops: list[Loop]  # innermost, in order, those that load from global memory
    text: list[tuple[int, str]]  # (address, instruction)


def width_of(opcode: str) -> int:
    return next((width for suffix, width in _WIDTHS if suffix in opcode), 4)


def tool(name: str) -> str | None:
    """A program of Triton's wheel, or of the toolkit on PATH."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    return shutil.which(name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(cubin: bytes) -> list[Kernel]:
    """The functions of a cubin or of an ELF file with device code."""
    disassembler = tool("cuobjdump")
    if disassembler is None:
        raise RuntimeError("cuobjdump is neither in Triton's wheel nor on PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(disassembler, "-res-usage", file.name)
        listing = _run(disassembler, "-sass", file.name)
    resources = {m[1]: (int(m[2]), int(m[3])) for m in _RESOURCES.finditer(usage)}
    kernels = []
    for part in re.split(r"Function : ", listing)[1:]:
        name = part.split(None, 1)[0]
        code = [(int(m[1], 16), m[2], m[3]) for m in _LINE.finditer(part)]
        registers, stack = resources[name]
        text = [(int(m[1], 16), m[2].strip()) for m in map(_TEXT.match, part.splitlines()) if m]
        kernels.append(Kernel(name, registers, stack, _sum(code), _innermost(code), text))
    return kernels


def _sum(code: list[tuple[int, str, str]]) -> Loop:
    loop = Loop()
    for _, opcode, _ in code:
        loop.add(opcode)
    return loop


def _innermost(code: list[tuple[int, str, str]]) -> list[Loop]:
    spans: dict[int, int] = {}
    for address, opcode, operands in code:
        target = re.findall(r"0x([0-9a-f]+)", operands)
        if opcode.split(".")[0] == "BRA" and target and int(target[-1], 16) < address:
            first = int(target[-1], 16)
            spans[first] = max(address, spans.get(first, 0))
    inner = [
        (a, b)
        for a, b in sorted(spans.items())
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans.items())
    ]
    loops = [_sum([line for line in code if a <= line[0] <= b]) for a, b in inner]
    return [loop for loop in loops if loop.load_bytes >= 8]


def resident(registers: int, threads: int, shared: int = 0, architecture: int = 90) -> int:
    """Programs that fit on an SM at once by registers, warps and shared memory."""
    per_warp = -(-registers * 32 // 256) * 256
    warps = -(-threads // 32)
    most_warps = {80: 64, 90: 64, 100: 64, 120: 48}[architecture]
    shared_memory = {80: 164, 90: 228, 100: 228, 120: 100}[architecture] << 10
    return min(65536 // per_warp // warps, most_warps // warps, shared_memory // (shared + 1024))


@dataclass(frozen=True)
class RegisterKernel:
    """What the name of a register kernel says: kColumns and kPower of csrc/cuda/register.cuh."""

    columns: int
    power: int  # 0: e^z is evaluated for itself, in the gradient again
    width: int  # columns of a vector: 16 bytes of the wider format

    @classmethod
    def of(cls, kernel: Kernel) -> RegisterKernel:
        found = re.search(r"Li(\d+)ELi(\d+)E", kernel.name)
        if found is None:
            raise ValueError(f"{kernel.name} is no register kernel")
        return cls(int(found[1]), int(found[2]), 4 if "Float32" in kernel.name else 8)

    @property
    def vectors(self) -> int:
        return self.columns // self.width


@dataclass
class Block:
    """Instructions without a jump in or out; `after` are the addresses where it may go on."""

    start: int
    code: list[str] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.code)


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
    following = {a: b for (a, _), (b, _) in itertools.pairwise(code)}
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


_POWER, _LOAD, _STORE = r"MUFU\.EX2", r"LDS\.(64|128)", r"STG\.E\.EF\.(64|128)"


@dataclass
class HotPath:
    """Instructions of one thread for one row."""

    of: RegisterKernel
    sweeps: int  # blocks of the loops over columns
    between: int
    special: int  # MUFU on the whole path
    # Within the sweeps: what every column needs, so that a block that was missed shows.
    exponentials: int
    loads: int  # vectors of shared memory
    stores: int  # vectors

    def is_complete(self) -> bool:
        """Two exponentials a column, each vector of both models read twice, one gradient stored.

        Where e^z is evaluated for itself, twice one more, and the student's vectors once more.
        """
        separate = self.of.power == 0
        exponentials = (4 if separate else 2) * self.of.columns
        loads = (5 if separate else 4) * self.of.vectors
        return (self.exponentials, self.loads, self.stores) == (
            exponentials,
            loads,
            self.of.vectors,
        )

    def per_element(self) -> tuple[float, float, float]:
        n = self.of.columns
        return self.sweeps / n, (self.sweeps + self.between) / n, self.special / n


def _join_last_store(blocks: dict[int, Block], vectors: int) -> None:
    """The compiler may jump around the last of a row of conditional stores: a warp takes it."""
    for block in blocks.values():
        last = [blocks[a] for a in block.after if a in blocks and blocks[a].count(_STORE) == 1]
        if block.count(_STORE) == vectors - 1 and len(last) == 1:
            block.code, block.after = block.code + last[0].code, last[0].after


def hot_path(kernel: Kernel) -> HotPath:
    """Of a register kernel."""
    shape = RegisterKernel.of(kernel)
    blocks = blocks_of(kernel.text)
    _join_last_store(blocks, shape.vectors)
    order = sorted(blocks)
    power = (3 if shape.power == 0 else 2) * shape.columns
    # Blocks of the rare second sums, and of warps whose columns are not all there, are none of a
    # full warp's way, or a longer one.
    observed = [a for a in order if blocks[a].count(_POWER) == power]
    maxima = [
        a
        for a in order
        if blocks[a].count("HMNMX|FMNMX")
        and blocks[a].count(_LOAD) == 2 * shape.vectors
        and not blocks[a].count(_POWER)
    ]
    stored = [a for a in order if a not in observed and blocks[a].count(_STORE) == shape.vectors]
    # The largest logits are the next row's, looked for before this one's gradient; or, in kernels
    # that do not look ahead, the row's own, before its exponentials.
    found = list(itertools.product(observed, maxima, stored))
    for orders in (found, [(m, o, g) for o, m, g in found]):
        ways = []
        for sweeps in orders:
            way = list(sweeps[:1])
            try:
                for goal in (*sweeps[1:], sweeps[0]):
                    way += _shortest(blocks, way[-1], goal)
            except ValueError:
                continue
            if len(set(way)) == len(way) - 1:  # one time around
                ways.append((sum(len(blocks[a].code) for a in way[:-1]), way, sweeps))
        if ways:
            break
    else:
        raise ValueError(f"no way through the sweeps of {kernel.name}")
    _, way, sweeps = min(ways)
    row = [blocks[a] for a in way[:-1]]
    inside = [blocks[a] for a in sweeps]
    exponentials, loads, stores = (
        sum(block.count(pattern) for block in inside) for pattern in (_POWER, _LOAD, _STORE)
    )
    length = sum(len(block.code) for block in inside)
    return HotPath(
        shape,
        length,
        sum(len(block.code) for block in row) - length,
        sum(block.count("MUFU") for block in row),
        exponentials,
        loads,
        stores,
    )
