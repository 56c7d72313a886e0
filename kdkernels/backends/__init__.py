"""The backends, in the order in which ``backend=None`` prefers them."""

from __future__ import annotations

from .base import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .torch_eager import TorchBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (CpuBackend(), CudaBackend(), TorchBackend(), ReferenceBackend())
}
