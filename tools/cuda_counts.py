"""What can be counted of the CUDA kernels without a GPU: a part of ``tools/kernel_report.py``.

Traffic, special functions and bank conflicts come from ptxsim (tests/simulate), which runs the real
launcher and PTX; registers, spills and machine instructions from nvcc and a disassembler. A part
whose tool is missing says so.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sass

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100", "120")
VOCABULARIES = (32000, 50257, 128256, 151936, 256000)
ROWS = 4


def print_traffic() -> None:
    """One line per logits and temperature: forward and gradient of KL + CE."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "simulate")]
    import cases
    import simulator
    import torch

    if reason := simulator.why_no_nvcc() or simulator.why_no_ptxsim():
        print(f"traffic: not counted ({reason})")
        return
    bfloat16, float32 = torch.bfloat16, torch.float32
    logits = [(dtype, dtype, v, v) for dtype in (bfloat16, float32) for v in VOCABULARIES]
    logits += [(float32, bfloat16, 128256, 128256), (bfloat16, float32, 128256, 128256)]
    logits += [(bfloat16, bfloat16, 50257, 50304)]  # padded beside packed: aligned differently
    print("KL + CE with gradient, labels, sm_90; bytes and operations per element; * is per row")
    print("student   teacher   V               T  blocks*  threads  read   written  ", end="")
    print("beside*  MUFU  PTX   conflicts")
    for student_dtype, teacher_dtype, vocab, columns in logits:
        for temperature in (1.0, 2.0):
            student, teacher = cases.pair((ROWS, columns), student_dtype, teacher_dtype)
            student, teacher = student[:, :vocab], teacher[:, :vocab].contiguous()
            labels = cases.labels_for((ROWS,), vocab, ignored=0.0)
            with simulator.simulated() as recorder:
                cases.evaluate(student, teacher, labels, backend="cuda", temperature=temperature)
            of = f"{vocab} of {columns}" if columns > vocab else str(vocab)
            print(f"{str(student_dtype)[6:]:9s} {str(teacher_dtype)[6:]:9s} {of:15s}", end=" ")
            print(f"{temperature:.0f}  {_counts(recorder.launches, student, teacher)}")


def _counts(launches: list[Any], student: Any, teacher: Any) -> str:
    (main,) = (s for s in launches if "register_kernel" in s.kernel or "resident" in s.kernel)
    elements = student.numel()
    logits = [b for k, b in main.buffers.items() if k.startswith(("student", "teacher"))]
    read = sum(b["load_bytes"] for b in logits)
    written = sum(b["store_bytes"] for b in main.buffers.values())
    beside = (read + written - elements * (2 * student.itemsize + teacher.itemsize)) / ROWS
    conflicts = main.shared["bank_conflicts"] / main.shared["wavefronts"]
    return (
        f"{main.grid[0] // ROWS:<7d}  {main.block[0]:<7d}"
        f"  {read / elements:.3f}  {written / elements:.3f}    {beside:<7.0f}"
        f"  {main.mufu / elements:.2f}  {main.d['thread_instructions'] / elements:.1f}"
        f"  {100 * conflicts:.1f} %"
    )


def compile_source(source: Path, arch: str) -> tuple[bytes, str]:
    """(cubin, ptxas's report) for one architecture with the flags of setup.py."""
    compiler = os.environ.get("NVCC") or shutil.which("nvcc") or "nvcc"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-DNDEBUG", f'-DKDKERNELS_CUDA_ARCHS="{arch}"']
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels.cubin")
        call = [compiler, *flags, f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", str(source)]
        done = subprocess.run([*call, "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return target.read_bytes(), done.stderr + done.stdout


def print_code(architecture: str) -> None:
    """Registers, spills and widths of every kernel; of register kernels the hot path per element.

    "sweeps" are the machine instructions of the hot loops, "row" those of a thread's whole way
    through a row, by its columns; the copies into shared memory are bulk copies besides.
    """
    if shutil.which(os.environ.get("NVCC", "nvcc")) is None:
        print("machine code: not counted (nvcc was not found)")
        return
    print(
        "kernel                                        arch  registers  spills  accesses n x bits"
        "                    sweeps  row   MUFU"
    )
    for source in SOURCES:
        cubin, _ = compile_source(source, architecture)
        for kernel in sass.read(cubin):
            spills = kernel.whole.spills
            print(f"{_short(kernel.name):45s} {architecture:>4s}  {kernel.registers:>9d}", end="")
            print(
                f"  {spills:>6d}  {_widths(kernel, architecture):35s}{_hot(kernel, architecture)}",
                flush=True,
            )


def _short(name: str) -> str:
    words = re.findall(
        r"(\w+?_kernel|ForwardKl|ReverseKl|EvenJsd|Jsd|Tvd|Skew\w+?Kl|LogRatio|"
        r"AlphaBeta|AlphaOnly|BetaOnly|AlphaOpposite|Nothing|Float32|bfloat162|half2|Li\d+|DTypeE\d)",
        name.replace("_ZN2kd4cuda", "").lstrip("0123456789"),
    )
    return " ".join(words).replace("Li", "").replace("DTypeE", "dtype ")


def _widths(kernel: sass.Kernel, arch: str) -> str:
    """A register kernel's accesses in the hot loops; of others all vector loads of the code."""
    if "register_kernel" in kernel.name and int(arch) >= 90:
        path = sass.hot_path(kernel)
        return f"LDS {path.loads}x128 STG {path.stores}x128"
    kinds: collections.Counter[tuple[str, int]] = collections.Counter()
    for opcode in (text.split(maxsplit=2)[text.startswith("@")] for _, text in kernel.text):
        base = opcode.split(".")[0]
        if base in ("LDS", "LDG") and sass.width_of(opcode) >= 8:
            kinds[base, 8 * sass.width_of(opcode)] += 1
    order = sorted(kinds.items(), key=lambda kind: (kind[0][0], -kind[0][1]))
    return " ".join(f"{base} {count}x{bits}" for (base, bits), count in order)


def _hot(kernel: sass.Kernel, arch: str) -> str:
    if "register_kernel" not in kernel.name or int(arch) < 90:
        return ""
    path = sass.hot_path(kernel)
    if not path.is_complete():
        return "  not recognised"
    sweeps, whole, special = path.per_element()
    return f"  {sweeps:6.1f}  {whole:4.1f}  {special:4.2f}"
