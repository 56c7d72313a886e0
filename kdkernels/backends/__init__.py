"""The backends, in the order in which ``backend=None`` prefers them.

The CPU backend takes only tensors on the CPU, where Triton runs in its interpreter at best. What
the CUDA backend refuses (no kernels in this build, an old driver, AMD) goes on to Triton, and so
does what Triton's kernels do faster: ``CudaBackend.yields`` has the measurements.
"""

from __future__ import annotations

from .base import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .torch_eager import TorchBackend
from .triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        CpuBackend(),
        CudaBackend(),
        TritonBackend(),
        TorchBackend(),
        ReferenceBackend(),
    )
}
