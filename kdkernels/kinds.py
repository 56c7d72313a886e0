"""Which tensors logits, or what they are made of, may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import LOGIT_DTYPES


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a part of a tensor that several processes share."""
    return type(tensor).__name__ == "DTensor"


def check_kind(name: str, tensor: Tensor) -> None:
    """TypeError unless logits, or what they are made of, may be of this kind, dtype and layout."""
    if is_dtensor(tensor):
        raise TypeError(f"{name}: a DTensor; pass its full_tensor() or to_local()")
    if tensor.dtype not in LOGIT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in LOGIT_DTYPES)
        raise TypeError(f"{name}: dtype {tensor.dtype} is not one of {allowed}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: layout {tensor.layout} is not torch.strided")
