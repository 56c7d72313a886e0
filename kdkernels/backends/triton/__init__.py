"""The Triton backend: one source of kernels for every GPU that Triton reaches.

``import kdkernels`` works without Triton; then the backend says so. With ``TRITON_INTERPRET=1`` in
the environment before the first use it runs on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...entries import check as check_entries
from ...problem import Problem, check_labels
from .. import gpu
from ..base import Backend, Result, has_rows
from .arguments import Kept
from .policy import CLOSED

#: Entries of a row: a sparse teacher has hundreds.
MOST_SLOTS = 1024

_IMPORT_ERROR: str | None = None
_launch: ModuleType | None = None


def _load() -> ModuleType | None:
    """The launching module, imported when first needed: Triton takes half a second to import."""
    global _IMPORT_ERROR, _launch
    if _launch is None and _IMPORT_ERROR is None:
        try:
            _launch = importlib.import_module(".launch", __name__)
        except ImportError as error:
            _IMPORT_ERROR = str(error)
    return _launch


class TritonBackend(Backend):
    name = "triton"
    state_rows = len(Kept._fields)

    def unavailable(self) -> list[str]:
        launch = _load()
        if launch is None:
            return [f"Triton cannot be imported ({_IMPORT_ERROR})"]
        if launch.INTERPRETED or gpu.is_available():
            return []
        if launch.asked_to_interpret():
            return ["TRITON_INTERPRET was set after the kernels had been imported: set it before"]
        return ["there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"]

    def why_not(self, problem: Problem) -> list[str]:
        launch = _load()
        assert launch is not None
        reasons = []
        kind = problem.student.device.type
        if kind != "cuda" and not (launch.INTERPRETED and kind == "cpu"):
            where = "cpu tensors" if launch.INTERPRETED else "cuda (or ROCm) tensors"
            reasons.append(f"it runs on {where}, not on {kind}")
        logits = {"student": problem.student}
        if problem.teacher_ids is None:
            logits["teacher"] = problem.teacher
        else:
            reasons += _why_not_sparse(problem)
        for name, tensor in logits.items():
            if tensor.dtype == torch.float64:
                reasons.append(f"it computes in float32, the {name}'s logits are float64")
        divergence = problem.options.divergence
        if divergence not in launch.functors.SWEPT + CLOSED:
            reasons.append(f"it has no kernel for the divergence {divergence!r}")
        if problem.vocab >= 1 << 24:
            reasons.append(f"its columns are counted in float32: {problem.vocab} >= 2^24")
        return reasons

    def prepare(self, problem: Problem) -> None:
        device = problem.student.device
        if problem.labels is not None and device.type == "cuda":
            gpu.make_label_flag(device)

    def forward(
        self,
        problem: Problem,
        *,
        want_gradient: bool,
        extras: bool,
        gradient_out: Tensor | None = None,
        grad_output: Tensor | None = None,
    ) -> Result:
        check_labels(problem)
        check_entries(problem, extras)
        launch = _load()
        assert launch is not None
        with _saying_what_a_capture_needs():
            result: Result = launch.forward(
                problem,
                want_gradient=want_gradient,
                extras=extras,
                gradient_out=gradient_out,
                grad_output=grad_output,
            )
        return result

    def backward(
        self,
        problem: Problem,
        statistics: Tensor,
        grad_output: Tensor,
        *,
        gradient_out: Tensor | None = None,
    ) -> Tensor:
        launch = _load()
        assert launch is not None
        with _saying_what_a_capture_needs():
            gradient: Tensor = launch.backward(
                problem, statistics, grad_output, gradient_out=gradient_out
            )
        return gradient

    def scale_gradient(self, gradient: Tensor, grad_output: Tensor, *, overwrite: bool) -> Tensor:
        if not has_rows(gradient):
            return super().scale_gradient(gradient, grad_output, overwrite=overwrite)
        launch = _load()
        assert launch is not None
        with _saying_what_a_capture_needs():
            scaled: Tensor = launch.scale_gradient(gradient, grad_output, overwrite=overwrite)
        return scaled


def _why_not_sparse(problem: Problem) -> list[str]:
    """What is refused of a sparse teacher."""
    options, reasons = problem.options, []
    slots = problem.teacher.shape[-1]
    if slots > MOST_SLOTS:
        reasons.append(f"it compares a row's entries with each other: {slots} > {MOST_SLOTS}")
    if options.tail == "uniform" and options.divergence != "forward_kl":
        reasons.append(
            f"it has no kernel for tail='uniform' with the divergence {options.divergence!r}, "
            "which is a sum over the vocabulary"
        )
    if options.tail == "renormalize" and options.divergence == "alpha_beta":
        alpha, beta = options.parameters
        if alpha + beta != 1:
            reasons.append(
                f"it has no kernel for tail='renormalize' with alpha_beta of alpha + beta = "
                f"{alpha + beta}, which is a sum over the vocabulary unless that is 1"
            )
    return reasons


class _saying_what_a_capture_needs:
    """Triton loads a kernel when it is first launched, which no stream may do while it captures."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and "captur" in str(error):
            raise RuntimeError(
                "Triton loads a kernel with the first call that needs it, which the capture of a "
                "CUDA graph does not allow: call the loss (and its backward) once with the same "
                "shapes, dtypes and options before the capture"
            ) from error
