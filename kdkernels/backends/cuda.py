"""The CUDA backend: C++ kernels in ``kdkernels._native``, on the caller's device and stream.

Everything is enqueued; nothing waits for the device, so CUDA graphs capture it. The native module
receives addresses, strides and the stream's handle, and allocates nothing.

A label outside the vocabulary (other than ``ignore_index``) cannot raise without a synchronisation:
it makes that row's loss and gradient NaN, and sets :func:`kdkernels.label_errors` of the device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..problem import LOGIT_DTYPES, Options, Problem, contiguous
from ..torch_private import constant_result, raw_stream
from . import gpu
from .base import empty_gradient, has_rows, row_stride
from .native import (
    CLOSED_FORMS,
    ENTRIES_LIMITS,
    MOST_REGISTER_COLUMNS,
    WHY_NOT,
    NativeBackend,
    pointer,
)
from .native import DIVERGENCES as _DIVERGENCES
from .native import MODULE as _native

_UNAVAILABLE = WHY_NOT
if _native is not None and not hasattr(_native, "cuda_kd_loss"):
    _UNAVAILABLE = "the native module was built without the CUDA kernels (KDKERNELS_CUDA)"

_device_refusals: dict[int, str] = {}


@constant_result
def _device_refusal(index: int) -> str:
    """Why no kernel of this build can run on this device; empty: they can. Asked once a device."""
    if index not in _device_refusals:
        _device_refusals[index] = _native.cuda_why_not(index)
    return _device_refusals[index]


@constant_result
@functools.cache
def _has_clusters(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _are_transformed(options: Options) -> bool:
    plain = options.student_scale == options.teacher_scale == 1.0
    return not plain or options.student_softcap != 0.0 or options.teacher_softcap != 0.0


def _entries_fit(problem: Problem) -> bool:
    """A bit a column, in whole words of rows that need not start aligned, and the slots."""
    most, of_slot = ENTRIES_LIMITS
    return problem.vocab // 8 + 8 + of_slot * problem.teacher.shape[-1] <= most


class CudaBackend(NativeBackend):
    name = "cuda"
    device_type = "cuda"  # the simulated tests pretend that it is another

    def unavailable(self) -> list[str]:
        if _UNAVAILABLE is not None:
            return [_UNAVAILABLE]
        if torch.version.cuda is None:
            return ["this torch was built without CUDA"]
        return [] if gpu.is_available() else ["torch.cuda.is_available() is False"]

    def why_not(self, problem: Problem) -> list[str]:
        device = problem.student.device
        if device.type != self.device_type:
            return [f"it runs on {self.device_type} tensors, not on {device.type}"]
        reasons = []
        refusal = _device_refusal(device.index or 0)
        if refusal:
            reasons.append(refusal)
        logits = {"student": problem.student}
        if problem.teacher_ids is None:
            logits["teacher"] = problem.teacher
        elif not _entries_fit(problem):
            reasons.append(
                f"{problem.vocab} columns and {problem.teacher.shape[-1]} entries of a row do not "
                f"fit in {ENTRIES_LIMITS[0]} bytes of shared memory"
            )
        for name, tensor in logits.items():
            if tensor.dtype == torch.float64:
                reasons.append(f"it has no kernel for float64 ({name})")
        if problem.options.divergence not in _DIVERGENCES:
            reasons.append(f"it has no kernel for the divergence {problem.options.divergence!r}")
        if problem.vocab > 1 << 30:
            reasons.append(f"its columns are 32-bit numbers: {problem.vocab} > 2^30")
        if problem.rows >= 1 << 31:
            reasons.append(f"its rows are 32-bit numbers: {problem.rows} > 2^31 - 1")
        return reasons

    def yields(self, problem: Problem, extras: bool) -> tuple[str, str] | None:
        """To Triton where only its slower kernels can run a problem, in shared memory or streaming.

        Milliseconds of loss and gradient in bfloat16, V = 128256, T = 2, on an H200 (triton 3.6,
        CUDA 13.0; marked * 2026-11-27, the others the day before), this backend and Triton:

        ==================================  =====  ======  =====
        problem                              rows    cuda  triton
        ==================================  =====  ======  =====
        forward KL, in registers *           8192    1.92   2.95
        the same at T = 1.7                  4096    1.40   2.02
        float32 beside a bfloat16 teacher *  4096    1.36   1.87
        bfloat16 beside a float32 teacher *  4096    1.27   1.56
        reverse KL, in registers             4096    1.20   1.61
        forward KL in shared memory *        8192    6.98   2.95
        forward KL, streaming *              8192   12.71   2.95
        64 entries a row, a whole call *     4096    1.91   1.06
        soft cap                             4096    9.87   3.53
        jsd                                  4096    5.26   4.26
        tvd                                  4096    4.43   2.51
        skew_forward_kl                      4096    5.86   4.33
        alpha_beta                           4096    7.77   4.78
        ==================================  =====  ======  =====

        What is not in it (label smoothing, extra outputs, float16 beside another dtype, column
        strides, longer rows, no clusters) runs in the two kernels that are slower there. Rows of
        the two models that are aligned differently run in registers: 8192 x 50257 of 50304 takes
        1.51 beside 1.75.
        """
        options, student, teacher = problem.options, problem.student, problem.teacher
        reasons = {
            "the teacher is sparse": problem.teacher_ids is not None,
            "the divergence is not a KL": options.divergence not in CLOSED_FORMS,
            "the logits are transformed": _are_transformed(options),
            "labels are smoothed": options.label_smoothing != 0.0 and problem.labels is not None,
            "float16 is beside another dtype": student.dtype != teacher.dtype
            and torch.float16 in (student.dtype, teacher.dtype),
            "entropies and hits are wanted": extras,
            # 0 is a stand-in's, whose logits will be contiguous.
            "a column stride is not 1": max(student.stride(-1), teacher.stride(-1)) > 1,
            "the row does not fit on the chip": problem.vocab
            > MOST_REGISTER_COLUMNS[max(student.itemsize, teacher.itemsize)],
            "the device has no clusters": student.is_cuda and not _has_clusters(student.device),
        }
        slow = next((reason for reason, holds in reasons.items() if holds), None)
        return None if slow is None else ("triton", slow)

    def prepare(self, problem: Problem) -> None:
        if problem.labels is not None:
            gpu.make_label_flag(problem.student.device)

    def denominator(self, problem: Problem) -> float:
        # A tensor of them stays on the device: see _launch.
        return problem.options.denominator if problem.options.reduction == "mean" else 1.0

    def execute(self, problem: Problem, *native: Any) -> None:
        """Enqueue the whole problem; what it needs lives until the stream has passed it."""
        workspace = problem.student.new_empty(
            self.module.cuda_workspace_bytes(problem.rows), dtype=torch.uint8
        )
        num_items = problem.num_items if problem.options.reduction == "mean" else None
        launch = self._launch(problem.student, workspace, problem.labels, num_items)
        self.module.cuda_kd_loss(*native, launch)

    def backward(
        self,
        problem: Problem,
        statistics: Tensor,
        grad_output: Tensor,
        *,
        gradient_out: Tensor | None = None,
    ) -> Tensor:
        gradient = empty_gradient(problem.student) if gradient_out is None else gradient_out
        self.run(problem, None, None, gradient, grad_output, extras=False)
        return gradient

    def scale_gradient(self, gradient: Tensor, grad_output: Tensor, *, overwrite: bool) -> Tensor:
        if not has_rows(gradient):
            return super().scale_gradient(gradient, grad_output, overwrite=overwrite)
        out = gradient
        if not overwrite:
            out = torch.empty_strided(
                gradient.shape, gradient.stride(), dtype=gradient.dtype, device=gradient.device
            )
        factor = contiguous(grad_output, torch.float32)
        columns = gradient.shape[-1]
        self.module.cuda_scale_gradient(
            pointer(gradient),
            pointer(out),
            LOGIT_DTYPES[gradient.dtype],
            gradient.numel() // max(columns, 1),
            columns,
            row_stride(gradient),
            pointer(factor),
            0 if factor.ndim == 0 else 1,
            self._launch(gradient),
        )
        return out

    def _launch(
        self,
        on: Tensor,
        workspace: Tensor | None = None,
        labels: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> Any:
        """On the caller's stream, with the flag for labels out of range."""
        flag = None if labels is None else gpu.label_errors(on.device)
        return self.module.Launch(
            *_stream(on.device), pointer(workspace), pointer(flag), pointer(num_items)
        )


def _stream(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream's handle."""
    # Not torch.cuda.current_stream(), which makes an object of it.
    return device.index, raw_stream(device.index)
