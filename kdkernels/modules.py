"""The losses as modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from .functional import KDLossOutput, fused_kd_loss, fused_topk_kd_loss
from .linear import fused_linear_kd_loss
from .options import Given, check, check_chunk_bytes
from .topk import TopK, options_with_tail

#: Options of a sparse teacher, and their places in :class:`~kdkernels.topk.TopK`.
_OF_ENTRIES = {"tail": "tail", "teacher_temperature": "temperature"}


def _keywords(function: Callable[..., Any], *left_out: str) -> inspect.Signature:
    """The keyword-only parameters of a function, as the signature of a module's constructor."""
    parameters = inspect.signature(function).parameters.values()
    return inspect.Signature(
        [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in left_out]
    )


class _Loss(nn.Module):
    """A loss function with its options fixed at construction, where bad ones are refused."""

    __signature__: ClassVar[inspect.Signature]
    sparse: ClassVar[bool] = False  #: whether the teacher is always a few entries of a row

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = self.__signature__.parameters
        if unknown := set(options) - set(known):
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        given = {name: options.get(name, known[name].default) for name in Given._fields}
        if isinstance(given["num_items"], Tensor):
            given["num_items"] = None
        settings = check(Given(**given), with_labels=True)
        of_entries = {to: options[name] for name, to in _OF_ENTRIES.items() if name in options}
        if self.sparse or of_entries:
            teacher = TopK(None, None, **of_entries)
            options_with_tail(Given(**given), settings.options, teacher)
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class KDLoss(_Loss):
    """:func:`kdkernels.fused_kd_loss` with its options fixed at construction.

    ``KDLoss(temperature=2.0, alpha=0.9)(student_logits, teacher_logits, labels)``. Takes every
    keyword of the function; those that change from batch to batch (``num_items``,
    ``token_weights``, ``student_rows``, ``teacher_rows``) may also be given to the call.

    Raises:
        TypeError, ValueError: at construction, an option that no call could have; named in the
            message. At a call, as ``fused_kd_loss``.
    """

    __signature__ = _keywords(fused_kd_loss)

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


class TopKKDLoss(_Loss):
    """:func:`kdkernels.fused_topk_kd_loss` with its options fixed at construction.

    ``TopKKDLoss(tail="renormalize")(student_logits, teacher_ids, teacher_log_probs, labels)``.

    Raises:
        TypeError, ValueError: as :class:`KDLoss`.
    """

    __signature__ = _keywords(fused_topk_kd_loss)
    sparse = True

    def forward(
        self,
        student_logits: Tensor,
        teacher_ids: Tensor,
        teacher_log_probs: Tensor,
        labels: Tensor | None = None,
        **per_batch: Any,
    ) -> Tensor | KDLossOutput:
        return fused_topk_kd_loss(
            student_logits,
            teacher_ids,
            teacher_log_probs,
            labels,
            **{**self.options, **per_batch},
        )


class FusedLinearKDLoss(_Loss):
    """:func:`kdkernels.fused_linear_kd_loss` with its options fixed at construction.

    ``FusedLinearKDLoss(temperature=2.0)(student_hidden, student_weight, teacher_hidden,
    teacher_weight, labels)``. Takes every option of the function; tensors, ``num_items`` and
    ``token_weights`` are given to the call.

    Raises:
        TypeError, ValueError: as :class:`KDLoss`.
    """

    __signature__ = _keywords(
        fused_linear_kd_loss,
        "student_bias",
        "teacher_bias",
        "student_logits",
        "teacher_logits",
        "teacher_ids",
        "teacher_log_probs",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_chunk_bytes(options.get("max_chunk_bytes"))

    def forward(self, *inputs: Tensor | None, **per_batch: Any) -> Tensor | KDLossOutput:
        return fused_linear_kd_loss(*inputs, **{**self.options, **per_batch})
