"""The loss as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import KDLossOutput, fused_kd_loss


class KDLoss(nn.Module):
    """:func:`kdkernels.fused_kd_loss` with its options fixed at construction.

    ``KDLoss(temperature=2.0, alpha=0.9)(student_logits, teacher_logits, labels)``. Takes every
    keyword of the function; ``num_items`` and ``token_weights``, which change from batch to batch,
    may also be given to the call.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = set(options) - set(fused_kd_loss.__kwdefaults__ or ())
        if unknown:
            raise TypeError(f"KDLoss has no option {', '.join(sorted(unknown))}")
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        **per_batch: Any,
    ) -> Tensor | KDLossOutput:
        return fused_kd_loss(
            student_logits, teacher_logits, labels, **{**self.options, **per_batch}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
