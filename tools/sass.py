"""Read NVIDIA machine code without a GPU: registers, spills and what the innermost loops hold.

The disassembler comes with Triton. A loop is a backward branch; the loops that count are the
innermost ones that read logits, so that code which runs once per row is not taken for a loop over
the vocabulary.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field

import triton

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
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
            width = _width(opcode)
            self.loads[8 * width] += 1
            self.load_bytes += width
        elif base == "STG":
            width = _width(opcode)
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


def _width(opcode: str) -> int:
    return next((width for suffix, width in _WIDTHS if suffix in opcode), 4)


def _tool(name: str) -> str:
    bundled = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    path = bundled if os.path.exists(bundled) else shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is neither in Triton's wheel nor on PATH")
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(cubin: bytes) -> list[Kernel]:
    """The functions of a cubin or of an ELF file with device code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        text = _run(_tool("cuobjdump"), "-sass", file.name)
    resources = {m[1]: (int(m[2]), int(m[3])) for m in _RESOURCES.finditer(usage)}
    kernels = []
    for part in re.split(r"Function : ", text)[1:]:
        name = part.split(None, 1)[0]
        code = [(int(m[1], 16), m[2], m[3]) for m in _LINE.finditer(part)]
        registers, stack = resources[name]
        kernels.append(Kernel(name, registers, stack, _sum(code), _innermost(code)))
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
