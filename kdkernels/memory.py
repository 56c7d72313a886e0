"""The memory of the last gradient on the CPU, kept for the next one.

A training loop allocates and frees a gradient of the same size at every step, and glibc returns
each of them to the system: touching fresh pages again costs nearly as much as the gradient itself
(a call of 528 x 32000 in float32 takes 9.3 ms with fresh pages of 2 MiB and 6.0 with kept memory;
two threads, Zen 5). So one block is kept, at most: the latest gradient's, reused when nothing
refers to it any more. ``KDKERNELS_KEEP_GRADIENT_MEMORY=0`` turns this off; :func:`release_memory`
gives the block back.
"""

from __future__ import annotations

import math
import os
import sys
import threading

import torch
from torch import Tensor
from torch.utils import deterministic

from . import torch_private
from .environment import setting

#: Smaller gradients stay with the allocator, which keeps their memory itself.
_SMALLEST = 1 << 20
#: Blocks start at a multiple of this, so that all of their pages can be huge.
_HUGE_PAGE = 2 << 20


class GradientMemory:
    """One slot. A block is free when this slot holds the only reference to its storage.

    torch counts the tensors (and NumPy arrays, DLPack capsules) that share a storage, but not who
    holds its Python object, which ``untyped_storage()`` hands out: Python counts those.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: torch.UntypedStorage | None = None
        self._alone = (0, 0)  # the references to a block that nobody else has

    def take(
        self, shape: torch.Size, dtype: torch.dtype, strides: tuple[int, ...] | None = None
    ) -> Tensor:
        """An uninitialised tensor, contiguous or with these strides, of which the first is largest.

        It owns its memory like any other.
        """
        elements = math.prod(shape) if strides is None else shape[0] * strides[0]
        needed = elements * dtype.itemsize
        if needed < _SMALLEST or setting("KDKERNELS_KEEP_GRADIENT_MEMORY") == "0":
            if strides is not None:
                return torch.empty_strided(shape, strides, dtype=dtype)
            return torch.empty(*shape, dtype=dtype)  # a Size as one argument takes twice as long
        with self._lock:  # between the look at the count and the new reference
            if not self._fits(needed):
                self._kept = None  # before the allocation: never two blocks of ours at a time
                self._kept = torch.UntypedStorage(needed + _HUGE_PAGE)
                self._alone = self._references()
            assert self._kept is not None
            offset = -self._kept.data_ptr() % _HUGE_PAGE // dtype.itemsize
            strides = strides or torch.empty(shape, device="meta").stride()
            tensor = torch.empty(0, dtype=dtype).set_(self._kept, offset, shape, strides)
        # What torch.empty does then; mypy does not know the module's property.
        poisoned = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        if poisoned and torch.are_deterministic_algorithms_enabled():
            tensor.fill_(math.nan)
        return tensor

    def _references(self) -> tuple[int, int]:
        """To the block's memory and to its Python object, this slot's included."""
        assert self._kept is not None
        # Not through a variable, which would be one more.
        return torch_private.storage_use_count(self._kept), sys.getrefcount(self._kept)

    def _fits(self, needed: int) -> bool:
        return (
            self._kept is not None
            and self._references() == self._alone
            and not self._kept.is_shared()  # another process may read it still
            and needed + _HUGE_PAGE <= self._kept.nbytes() <= 2 * needed + _HUGE_PAGE
        )

    def release(self) -> None:
        """Forget the block: it is freed now, or with the last tensor that uses it."""
        with self._lock:
            self._kept = None


GRADIENT_MEMORY = GradientMemory()


def release_memory() -> None:
    """Give back the memory that is kept for the next gradient on the CPU (one gradient's size)."""
    GRADIENT_MEMORY.release()


def _after_fork() -> None:
    GRADIENT_MEMORY.__init__()  # type: ignore[misc]  # another thread may hold the lock for ever


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
