"""What every feature and relation loss does with dtypes, masks and zero vectors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def check_pair(student: Tensor, teacher: Tensor, *, same_width: bool) -> None:
    """ValueError unless both have one leading shape (and, if asked, one last dimension)."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim < 1:
            raise TypeError(f"{name}: expected a floating-point tensor [..., width]")
    ours, theirs = student.shape, teacher.shape
    if ours[:-1] != theirs[:-1] or (same_width and ours != theirs):
        raise ValueError(f"teacher: shape {tuple(theirs)} does not fit the student's {tuple(ours)}")


def check_mask(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """``mask`` as bool of exactly ``shape``; None: all True."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.shape != shape:
        raise ValueError(f"mask: shape {tuple(mask.shape)} is not {tuple(shape)}")
    return mask.to(device=device, dtype=torch.bool)


def full_precision(tensor: Tensor) -> Any:
    """A context without autocast: what is widened to float32 stays float32."""
    if not torch.amp.is_autocast_available(tensor.device.type):
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def widened(tensor: Tensor, mask: Tensor) -> Tensor:
    """``tensor`` [..., W] in float32 (float64 stays), with 0 where ``mask`` [...] is False.

    What is masked may be NaN: it reaches neither the value nor the gradient.
    """
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return torch.where(
        mask.unsqueeze(-1), wide, torch.zeros((), dtype=wide.dtype, device=wide.device)
    )


def unit(vectors: Tensor) -> Tensor:
    """``vectors / |vectors|`` over the last dimension; a zero vector stays 0, with gradient 0."""
    squared = vectors.square().sum(-1, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 0.0, vectors / torch.where(zero, 1.0, squared).sqrt())


def masked_mean(values: Tensor, mask: Tensor, num_items: float | Tensor | None = None) -> Tensor:
    """Sum of ``values`` where ``mask`` holds, over their number or over ``num_items``.

    Nothing counted (or ``num_items`` 0) gives 0, connected to the graph.
    """
    total = torch.where(mask, values, 0.0).sum()
    given = mask.sum() if num_items is None else num_items
    # Of a number torch would else make one of the default dtype, which may be bfloat16.
    count = torch.as_tensor(given, dtype=values.dtype, device=values.device)
    return total / torch.where(count == 0, 1.0, count)
