"""``python -m benchmarks.kernel_report``: what can be counted of the CUDA kernels without a GPU.

Traffic, special functions and bank conflicts come from ptxsim (tests/simulate), which runs the real
launcher and PTX; registers, spills and machine instructions from nvcc and a disassembler. A part
whose tool is missing says so.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from . import machine_code

ROOT = Path(__file__).resolve().parents[1]
VOCABULARIES = (32000, 50257, 128256, 151936, 256000)
ROWS = 4


def simulated_traffic() -> None:
    """One line per vocabulary, dtype and temperature: forward and gradient of KL + CE."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "simulate")]
    import cases
    import simulator
    import torch

    if reason := simulator.why_not():
        print(f"traffic: not counted ({reason})")
        return
    print("KL + CE with gradient, labels, sm_90; bytes and operations per element; * is per row")
    print("dtype     V       T  blocks*  threads  read   written  beside*  MUFU  PTX   conflicts")
    for dtype in (torch.bfloat16, torch.float32):
        for vocab in VOCABULARIES:
            for temperature in (1.0, 2.0):
                student, teacher = cases.pair((ROWS, vocab), dtype)
                labels = cases.labels_for((ROWS,), vocab, ignored=0.0)
                with simulator.simulated() as recorder:
                    cases.evaluate(
                        student, teacher, labels, backend="cuda", temperature=temperature
                    )
                print(_line(recorder.launches, dtype.itemsize, str(dtype)[6:], vocab, temperature))


def _line(launches: list, size: int, dtype: str, vocab: int, temperature: float) -> str:
    (main,) = (s for s in launches if "register_kernel" in s.kernel or "resident" in s.kernel)
    elements = ROWS * vocab
    logits = [b for k, b in main.buffers.items() if k.startswith(("student", "teacher"))]
    read = sum(b["load_bytes"] for b in logits)
    written = sum(b["store_bytes"] for b in main.buffers.values())
    beside = (read + written) / ROWS - 3 * size * vocab
    conflicts = main.shared["bank_conflicts"] / main.shared["wavefronts"]
    return (
        f"{dtype:9s} {vocab:<7d} {temperature:.0f}  {main.grid[0] // ROWS:<7d}  {main.block[0]:<7d}"
        f"  {read / elements:.3f}  {written / elements:.3f}    {beside:<7.0f}"
        f"  {main.mufu / elements:.2f}  {main.d['thread_instructions'] / elements:.1f}"
        f"  {100 * conflicts:.1f} %"
    )


def compiled_code(archs: tuple[str, ...] = ("80", "90", "100", "120")) -> None:
    """Registers and spills of every kernel, and the register kernels' hot path."""
    disassembler = machine_code.find_cuobjdump()
    print("\nkernel                                        arch  registers  spill  loops  row   MUFU")
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            for arch in archs:
                target = str(Path(folder, source.stem + arch))
                call = [*machine_code.nvcc_command(arch), str(source), "-o", target]
                report = subprocess.run(call, capture_output=True, text=True).stderr
                code = machine_code.disassemble(disassembler, target) if disassembler else {}
                for name, spilled, registers in _kernels(report):
                    print(f"{_short(name):45s} {arch:>4s}  {registers:>9s}  {spilled:>5s}", end="")
                    print(_hot(name, arch, code))


def _kernels(report: str) -> list[tuple[str, str, str]]:
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return re.findall(pattern, report, re.DOTALL)


def _short(name: str) -> str:
    words = re.findall(r"(\w+?_kernel|ForwardKl|ReverseKl|EvenJsd|Jsd|Tvd|Skew\w+?Kl|LogRatio|"
                       r"AlphaBeta|AlphaOnly|BetaOnly|AlphaOpposite|Float32|bfloat162|half2|Li\d)",
                       name.replace("_ZN2kd4cuda", "").lstrip("0123456789"))
    return " ".join(words).replace("Li", "")


def _hot(name: str, arch: str, code: dict) -> str:
    if "register_kernel" not in name or int(arch) < 90 or name not in code:
        return ""
    sweeps, whole, special = machine_code.hot_path(code[name]).per_element()
    return f"  {sweeps:5.1f}  {whole:4.1f}  {special:4.2f}"


if __name__ == "__main__":
    simulated_traffic()
    compiled_code()
