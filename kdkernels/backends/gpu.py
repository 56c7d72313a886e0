"""What the GPU backends share: is there a GPU; the flag for labels outside the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_private import constant_result

_available = False
_flags: dict[torch.device, Tensor] = {}


@constant_result
def is_available() -> bool:
    """``torch.cuda.is_available()``, which asks the driver each time, until it has said yes."""
    global _available
    _available = _available or torch.cuda.is_available()
    return _available


def label_errors(device: torch.device | str | int | None = None) -> Tensor:
    """Whether a GPU kernel has met a label outside the vocabulary: int64 [], on the device.

    0 if none has, else 1 + the highest row that had one, in the labels' flat order (of a tile,
    where ``fused_linear_kd_loss`` works by tiles; of the student's rows, where ``student_rows``
    names them, and then also a row that two pairs have, or one whose pair names no row of the
    teacher's). A GPU cannot raise for a label without a synchronisation: the row's loss and
    gradient become NaN and this flag is set, by the backends "cuda" and "triton" alike; on a CPU
    the call raises IndexError instead. Reading the flag synchronises; only its reader resets it, by
    ``zero_()``.

    ``device`` is a CUDA (or ROCm) device, the current one by default. The flag comes to be with the
    device's first call that has labels, or here; whoever makes it waits, this once, until it is 0
    for every stream. RuntimeError if that is inside the capture of a CUDA graph, whose replays
    would reset it.
    """
    device = torch.device("cuda" if device is None else device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    flag = _flags.get(device)
    return _make_flag(device) if flag is None else flag


def _make_flag(device: torch.device) -> Tensor:
    if device.type != "cuda":
        return _flags.setdefault(device, torch.zeros((), dtype=torch.int64, device=device))
    if _is_capturing(device):
        raise RuntimeError(
            f"the first call with labels on {device} is inside the capture of a CUDA graph: "
            f'call kdkernels.label_errors("{device}"), or the loss once, before the capture'
        )
    flag = torch.zeros((), dtype=torch.int64, device=device)
    # A kernel on another stream may be the next to use it.
    torch.cuda.current_stream(device).synchronize()
    # The first of two threads' flags: a kernel may have the address of it already.
    return _flags.setdefault(device, flag)


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@constant_result
def make_label_flag(device: torch.device) -> bool:
    """Make the flag while a call is checked (or traced), not inside a graph's memory pool."""
    return label_errors(device).dtype == torch.int64
