"""What the GPU backends share: the flag for labels outside the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

_flags: dict[torch.device, Tensor] = {}


def label_errors(device: torch.device | str | int | None = None) -> Tensor:
    """Whether a GPU kernel has met a label outside the vocabulary: int64 [], on the device.

    0 if none has, else 1 + the highest row that had one, in the labels' flat order (of a tile,
    where ``fused_linear_kd_loss`` works by tiles). A GPU cannot raise for a label without a
    synchronisation: the row's loss and gradient become NaN and this flag is set, by the backends
    "cuda" and "triton" alike; on a CPU the call raises IndexError instead. Reading the flag
    synchronises; only its reader resets it, by ``zero_()``.

    ``device`` is a CUDA (or ROCm) device, the current one by default. The flag comes to be with the
    device's first call that has labels, or here. RuntimeError if that is inside the capture of a
    CUDA graph, whose replays would reset it.
    """
    device = torch.device("cuda" if device is None else device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _flags:
        if device.type == "cuda" and _is_capturing(device):
            raise RuntimeError(
                f"the first call with labels on {device} is inside the capture of a CUDA graph: "
                f'call kdkernels.label_errors("{device}"), or the loss once, before the capture'
            )
        _flags[device] = torch.zeros((), dtype=torch.int64, device=device)
    return _flags[device]


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@torch.compiler.assume_constant_result
def make_label_flag(device: torch.device) -> bool:
    """Make the flag while a call is checked (or traced), not inside a graph's memory pool."""
    return label_errors(device).dtype == torch.int64
