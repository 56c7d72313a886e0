"""The backends, in the order in which ``backend=None`` prefers them.

The CPU backend takes only tensors on the CPU, where Triton runs in its interpreter at best.
"""

from __future__ import annotations

from .base import Backend
from .cpu import CpuBackend
from .reference import ReferenceBackend
from .torch_eager import TorchBackend
from .triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (CpuBackend(), TritonBackend(), TorchBackend(), ReferenceBackend())
}
