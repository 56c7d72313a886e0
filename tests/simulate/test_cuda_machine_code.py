"""What the compiler made of the kernels: no spills, no local memory, few instructions."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import simulator

sys.path.insert(0, str(simulator.ROOT / "tools"))
import cuda_counts
import sass

pytestmark = pytest.mark.skipif(
    simulator.why_no_nvcc() is not None, reason=str(simulator.why_no_nvcc())
)


@pytest.mark.parametrize("arch", cuda_counts.ARCHITECTURES)
@pytest.mark.parametrize("source", cuda_counts.SOURCES, ids=lambda p: p.stem)
def test_nothing_is_spilled(source: Path, arch: str) -> None:
    cubin, report = cuda_counts.compile_source(source, arch)
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report)
    assert found, report
    assert set(found) == {("0", "0", "0")}
    if source.stem.startswith("register_") and arch in ("90", "100"):
        hot_loops_are_short(cubin)


def hot_loops_are_short(cubin: bytes) -> None:
    """At most 28 machine instructions and 3 special functions an element."""
    if sass.tool("cuobjdump") is None:
        pytest.skip("cuobjdump was not found (the CUDA toolkit or Triton's wheel has it)")
    kernels = sass.read(cubin)
    assert len(kernels) == 6
    for kernel in kernels:
        sweeps, _, special = sass.hot_path(kernel).per_element()
        assert sweeps <= 28.0 and special <= 3.0, kernel.name
