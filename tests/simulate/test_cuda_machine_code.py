"""What the compiler made of the kernels: no spills, no local memory, few instructions.

For sm_90 and the kernel of the project's target; KDKERNELS_SIMULATE=all compiles every source for
every architecture, in half an hour.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import sampling
import simulator

sys.path.insert(0, str(simulator.ROOT / "tools"))
import cuda_counts
import sass

pytestmark = pytest.mark.skipif(
    simulator.why_no_nvcc() is not None, reason=str(simulator.why_no_nvcc())
)

ARCHITECTURES = cuda_counts.ARCHITECTURES if sampling.WANTS_ALL else ("90",)
SOURCES = [
    source
    for source in cuda_counts.SOURCES
    if sampling.WANTS_ALL or source.stem == "register_bfloat16_forward"
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_nothing_is_spilled_and_hot_loops_are_short(source: Path, arch: str) -> None:
    cubin, report = cuda_counts.compile_source(source, arch)
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report)
    assert found, report
    assert set(found) == {("0", "0", "0")}
    if source.stem.startswith("register_") and arch in ("90", "100"):
        hot_loops_are_short(cubin)


def hot_loops_are_short(cubin: bytes) -> None:
    """At most 28 machine instructions an element, and 3 special functions where e^z is a power."""
    if sass.tool("cuobjdump") is None:
        pytest.skip("cuobjdump was not found (the CUDA toolkit or Triton's wheel has it)")
    kernels = sass.read(cubin)
    # By columns of a thread and power: float32 has no wide ones, two formats have few powers.
    mixed = kernels[0].name.count("Float32") == 1 and "bfloat16" in kernels[0].name
    assert len(kernels) == (3 if mixed else 5 if "Float32" in kernels[0].name else 8)
    for kernel in kernels:
        path = sass.hot_path(kernel)
        assert path.is_complete(), (kernel.name, path)
        sweeps, _, special = path.per_element()
        assert special <= (3.0 if path.of.power else 4.5), (kernel.name, path)
        assert sweeps <= 28.0, (kernel.name, path)
