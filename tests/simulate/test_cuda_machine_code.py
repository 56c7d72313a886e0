"""What the compiler made of the kernels: no spills, no local memory, few instructions an element."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulator

sys.path.insert(0, str(simulator.ROOT))
from benchmarks import machine_code

pytestmark = pytest.mark.skipif(
    simulator.why_no_nvcc() is not None, reason=str(simulator.why_no_nvcc())
)

SOURCES = sorted((simulator.ROOT / "csrc" / "cuda").glob("*.cu"))


def compiled(source: Path, arch: str, folder: Path) -> tuple[Path, str]:
    """(cubin, ptxas's report) with the flags of the build."""
    target = folder / f"{source.stem}_{arch}.cubin"
    done = subprocess.run(
        [*machine_code.nvcc_command(arch), str(source), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target, done.stderr + done.stdout


@pytest.mark.parametrize("arch", ("80", "90", "100", "120"))
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_nothing_is_spilled(source: Path, arch: str, tmp_path: Path) -> None:
    _, report = compiled(source, arch, tmp_path)
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report)
    assert found, report
    assert set(found) == {("0", "0", "0")}


@pytest.mark.parametrize("arch", ("90", "100"))
@pytest.mark.parametrize("name", ("bfloat16", "float16", "float32"))
def test_the_hot_loops_take_at_most_28_instructions(name: str, arch: str, tmp_path: Path) -> None:
    disassembler = machine_code.find_cuobjdump()
    if disassembler is None:
        pytest.skip("cuobjdump was not found (the CUDA toolkit or Triton's wheel has it)")
    source = simulator.ROOT / "csrc" / "cuda" / f"register_{name}.cu"
    cubin, _ = compiled(source, arch, tmp_path)
    kernels = machine_code.disassemble(disassembler, str(cubin))
    assert len(kernels) == 6
    for kernel, code in kernels.items():
        sweeps, _, special = machine_code.hot_path(code).per_element()
        assert sweeps <= 28.0 and special <= 3.0, kernel
