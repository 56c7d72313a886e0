"""From a problem to launches of the Triton kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import STATISTICS, Problem, RowLayout, row_layout
from ..base import Result, empty_gradient, row_stride
from ..gpu import label_errors
from . import functors, kernels, policy
from .policy import Device, LaunchPolicy, Variant

#: Whether Triton interprets its kernels on the CPU; decided when the kernels are imported.
INTERPRETED: bool = triton.knobs.runtime.interpret


#: Rows behind the statistics with which a backward starts where the forward ended.
STATE_ROWS = 7


class Constants:
    """A Variant as the kernels see it: equal and cached by its text."""

    def __init__(self, variant: Variant) -> None:
        self._text = repr(variant)
        for name, given in variant.constants().items():
            setattr(self, name, given if INTERPRETED else tl.constexpr(given))

    def __repr__(self) -> str:
        return self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._text == other._text


@functools.lru_cache(maxsize=256)
def _constants(variant: Variant) -> Constants:
    return Constants(variant)


@functools.lru_cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    kind = "hip" if torch.version.hip else "cuda"
    architecture = 0 if kind == "hip" else 10 * properties.major + properties.minor
    warp = getattr(properties, "warp_size", 32)
    processors = properties.multi_processor_count
    return Device(kind, architecture, processors, properties.L2_cache_size, warp)


def describe(tensor: Tensor) -> Device:
    """The device that a tensor is on, in the policy's terms."""
    if INTERPRETED:
        return policy.INTERPRETER
    return _gpu(tensor.device.index) if tensor.device.type == "cuda" else policy.H100


#: Triton's interpreter keeps the running program in a global.
_interpreter = threading.RLock()


def _guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device's current stream: make it the tensor's device."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return _interpreter if INTERPRETED else contextlib.nullcontext()


class Launch:
    """The launches of one problem: its arguments, and the variants of the row kernel they need."""

    def __init__(
        self, problem: Problem, device: Device, sweeps: int, launch_policy: LaunchPolicy | None
    ) -> None:
        self.problem = problem
        self.device = device
        self.layout = row_layout(problem.student, problem.teacher)
        self.student, self.teacher = self.layout.tensors
        sizes = (self.student.element_size(), self.teacher.element_size())
        self.width = 16 // min(sizes)
        self.facts = {
            "rows": problem.rows,
            "vocab": problem.vocab,
            "row_bytes": problem.vocab * sum(sizes),
            "width": self.width,
            "sweeps": sweeps,
            "heaviness": _heaviness(problem),
        }
        self.key = policy.key(device, **self.facts)
        self.policy = (
            launch_policy
            or policy.tuned(device, problem.rows, self.key)
            or policy.choose(device, **self.facts)
        )
        self.items: Tensor | None = None
        self.row_factor = 1.0
        self._denominator()

    def _denominator(self) -> None:
        """What divides each row's loss: a number, or one on the device (no synchronisation)."""
        problem, options = self.problem, self.problem.options
        if options.reduction != "mean":
            return
        if options.denominator:
            self.row_factor = 1.0 / options.denominator
        elif problem.num_items is not None:
            self.items = problem.num_items
        elif problem.labels is None:
            self.row_factor = 1.0 / max(problem.rows, 1)
        else:
            self.items = torch.empty((), dtype=torch.float32, device=self.student.device)
            kernels.count_rows[(1,)](
                problem.labels, self.items, problem.rows, options.ignore_index, SIZE=1024
            )

    def variant(self, gradient: Tensor | None, extras: bool, upstream: bool) -> Variant:
        """The variant that does everything in one launch; callers replace its stages."""
        problem, options, launch = self.problem, self.problem.options, self.policy
        teacher_phase, gradient_phase = _phases(self.layout, problem, self.width, gradient)
        unit_student, unit_teacher = (s[2] == 1 for s in self.layout.strides)
        with_labels = problem.labels is not None
        kd_in_loss = options.alpha != 0
        with_kd = kd_in_loss or extras
        return Variant(
            K=launch.vectors,
            THREADS=launch.num_warps * self.device.warp,
            W=self.width,
            itemsize=self.student.element_size(),
            interpreted=INTERPRETED,
            nvidia=self.device.kind == "cuda",
            divergence=options.divergence,
            case=_case(problem),
            power=_power(problem),
            extras=extras,
            with_kd=with_kd,
            kd_in_loss=kd_in_loss,
            with_ce=with_labels and (options.alpha != 1 or extras),
            ce_in_loss=with_labels and options.alpha != 1,
            smoothing=with_labels and options.label_smoothing != 0,
            z_loss=options.z_loss != 0,
            student_scale=options.student_scale != 1,
            teacher_scale=options.teacher_scale != 1,
            student_softcap=options.student_softcap != 0,
            teacher_softcap=options.teacher_softcap != 0,
            with_labels=with_labels,
            with_items=self.items is not None,
            with_weights=problem.token_weights is not None,
            with_upstream=upstream,
            unit_student=unit_student,
            unit_teacher=unit_teacher,
            align_student=unit_student,
            align_teacher=unit_student and teacher_phase,
            align_gradient=unit_student and gradient_phase,
            base_aligned=not any(
                t is not None and t.data_ptr() % 16 for t in (self.student, self.teacher, gradient)
            ),
            single=problem.vocab == 1,
            truncated=gradient is not None and problem.student.shape[-1] > problem.vocab,
            observe=True,
            evaluate=with_kd and options.divergence in functors.SWEPT,
            finish=True,
            differentiate=gradient is not None,
            source="partials",
            exchange=launch.exchange,
            split=launch.split,
            members=launch.split,
            collect_sums=launch.exchange == "spin"
            and with_kd
            and options.divergence in functors.SWEPT,
        )

    def run(
        self, variant: Variant, programs: int, loss: Tensor | None, statistics: Tensor,
        gradient: Tensor | None, partials: Tensor | None, upstream: Tensor | None,
    ) -> None:  # fmt: skip
        """One launch of the row kernel."""
        problem, options = self.problem, self.problem.options
        parameters = (*options.parameters, 0.0, 0.0)
        arrivals = None
        extra: dict[str, Any] = {}
        if self.policy.registers is not None:
            extra["maxnreg"] = self.policy.registers
        if variant.exchange == "spin":
            groups = programs // variant.split
            arrivals = torch.zeros(groups, dtype=torch.int32, device=self.student.device)
            extra["launch_cooperative_grid"] = True
        (student_outer, student_inner, student_column), teacher_strides = self.layout.strides
        kernels.kd_rows[(programs,)](
            self.student,
            self.teacher,
            problem.labels,
            problem.token_weights,
            self.items,
            upstream,
            loss,
            statistics,
            gradient,
            partials,
            arrivals,
            label_errors(self.student.device) if variant.with_labels else None,
            problem.rows,
            self.layout.inner,
            problem.vocab,
            problem.student.shape[-1],
            0 if gradient is None else row_stride(gradient),
            student_outer,
            student_inner,
            student_column,
            *teacher_strides,
            0 if upstream is None or upstream.ndim == 0 else upstream.stride(0),
            options.ignore_index,
            self.row_factor,
            math.log2(math.e) / options.temperature,
            options.temperature,
            options.kd_scale,
            options.alpha,
            options.label_smoothing,
            options.z_loss,
            options.student_scale,
            options.teacher_scale,
            options.student_softcap,
            options.teacher_softcap,
            *parameters[:2],
            P=_constants(variant),
            num_warps=self.policy.num_warps,
            **extra,
        )

    def stages(
        self, variant: Variant, loss: Tensor | None, statistics: Tensor, gradient: Tensor | None,
        upstream: Tensor | None,
    ) -> None:  # fmt: skip
        """All launches of the row kernel that ``variant`` needs under the policy's exchange."""
        launch, rows = self.policy, self.problem.rows
        partials = None
        if launch.exchange != "none":
            slots = rows if launch.exchange == "launch" else 2 * (launch.programs // launch.split)
            partials = self.student.new_empty(
                (slots, kernels.PARTIALS.value, launch.split), dtype=torch.float32
            )
        run = functools.partial(
            self.run, loss=loss, statistics=statistics, gradient=gradient, partials=partials,
            upstream=upstream,
        )  # fmt: skip
        if launch.exchange != "launch":
            run(variant, launch.programs)
            return
        replace = dataclasses.replace
        quiet = replace(variant, finish=False, differentiate=False, truncated=False)
        observed = variant
        if variant.observe:
            run(replace(quiet, evaluate=False), launch.programs)
            observed = replace(variant, observe=False)
        if variant.evaluate:
            run(replace(quiet, observe=False), launch.programs)
            observed = replace(observed, evaluate=False, collect_sums=True)
        # The student's memory may be the gradient's: then a row must be finished before any slice
        # of it is differentiated, since finishing reads the label's logit.
        own = self.student.data_ptr()  # 0 for a tensor without memory
        in_place = gradient is not None and own != 0 and gradient.data_ptr() == own
        if variant.finish and (in_place or not variant.differentiate):
            programs = min(rows, self.device.processors * launch.residents)
            finish = replace(observed, split=1, differentiate=False, truncated=False)
            run(finish, programs)
            observed = replace(observed, finish=False)
        if variant.differentiate:
            run(observed, launch.programs)


def _heaviness(problem: Problem) -> int:
    """The index of ``policy.TILES``: how much a thread has to hold per element."""
    options = problem.options
    swept = options.divergence in functors.SWEPT
    capped = options.student_softcap != 0 or options.teacher_softcap != 0
    reasons = swept + capped + (options.divergence == "alpha_beta")
    return 1 + reasons if reasons else int(_power(problem) == 0)


def _power(problem: Problem) -> int:
    """T where exp(z) is cheaply a power of exp(z / T), else 0."""
    temperature = problem.options.temperature
    return int(temperature) if temperature in (1, 2, 3, 4) else 0


def _case(problem: Problem) -> str:
    options = problem.options
    if options.divergence != "alpha_beta":
        return "none"
    alpha, beta = options.parameters
    return functors.alpha_beta_case(alpha, beta)


def _phases(
    layout: RowLayout, problem: Problem, width: int, gradient: Tensor | None
) -> tuple[bool, bool]:
    """Whether the teacher's and the gradient's rows all start at the student's place in a vector.

    Then one peeled head aligns all of them. A start is counted in elements modulo ``width``.
    """

    def starts(tensor: Tensor, strides: tuple[int, int, int]) -> tuple[int, int, int]:
        base = tensor.data_ptr() // tensor.element_size() % width
        outer = strides[0] % width if layout.outer > 1 else 0
        inner = strides[1] % width if layout.inner > 1 else 0
        return base, outer, inner

    student = starts(layout.tensors[0], layout.strides[0])
    teacher = starts(layout.tensors[1], layout.strides[1])
    same_teacher = layout.strides[1][2] == 1 and teacher == student
    if gradient is None:
        return same_teacher, False
    row = row_stride(gradient)
    own = starts(gradient, (row * layout.inner, row, 1))
    return same_teacher, own == student


def forward(
    problem: Problem, *, want_gradient: bool, extras: bool, gradient_out: Tensor | None = None,
    device: Device | None = None, launch_policy: LaunchPolicy | None = None,
) -> Result:  # fmt: skip
    """``Backend.forward``; the last two arguments are for tests and tuning."""
    student, rows = problem.student, problem.rows
    reduce = problem.options.reduction != "none"
    shape = problem.leading_shape
    empty = functools.partial(torch.empty, dtype=torch.float32, device=student.device)
    statistics = empty((len(STATISTICS) + STATE_ROWS, *shape))
    gradient = gradient_out
    if gradient is None and want_gradient:
        gradient = empty_gradient(student)
    if rows == 0:
        return Result(torch.zeros_like(empty(() if reduce else shape)), statistics, gradient)
    losses = empty(shape)
    with _guard(student):
        swept = problem.options.divergence in functors.SWEPT
        sweeps = 1 + swept + (gradient is not None)
        launch = Launch(problem, device or describe(student), sweeps, launch_policy)
        variant = launch.variant(gradient, extras, upstream=False)
        launch.stages(variant, losses, statistics, gradient, None)
        if not reduce:
            return Result(losses, statistics, gradient)
        loss = empty(())
        kernels.sum_rows[(1,)](losses, loss, rows, SIZE=1024)
    return Result(loss, statistics, gradient)


def backward(
    problem: Problem, statistics: Tensor, grad_output: Tensor, *,
    gradient_out: Tensor | None = None, device: Device | None = None,
    launch_policy: LaunchPolicy | None = None,
) -> Tensor:  # fmt: skip
    """``Backend.backward``: the gradient from the inputs and the forward's statistics."""
    gradient = empty_gradient(problem.student) if gradient_out is None else gradient_out
    if problem.rows == 0:
        return gradient
    if grad_output.ndim > 0:
        grad_output = grad_output.reshape(-1)
    with _guard(problem.student):
        launch = Launch(problem, device or describe(problem.student), 1, launch_policy)
        variant = dataclasses.replace(
            launch.variant(gradient, False, upstream=True),
            observe=False, evaluate=False, finish=False, source="statistics", exchange="none",
            collect_sums=False,
        )  # fmt: skip
        programs = launch.policy.programs
        launch.run(variant, programs, None, statistics.contiguous(), gradient, None, grad_output)
    return gradient


#: Elements of one program's step, and programs, of the scaling kernel: 16 bytes per thread and
#: enough programs to fill any device, yet few enough to return at once where there is no work.
SCALE_BLOCK, SCALE_PROGRAMS = 2048, 1024


def scale_gradient(gradient: Tensor, grad_output: Tensor, *, overwrite: bool) -> Tensor:
    """``Backend.scale_gradient``: the device reads the factor, and stops there if it is 1."""
    out = gradient if overwrite else torch.empty_like(gradient)
    if gradient.numel() == 0:
        return out
    width = gradient.shape[-1]
    rows = gradient.numel() // width
    per_row = grad_output.ndim > 0
    upstream = grad_output.reshape(-1)
    programs = min(SCALE_PROGRAMS, rows * -(-width // SCALE_BLOCK))
    with _guard(gradient):
        kernels.scale_rows[(programs,)](
            gradient, out, upstream, rows, width, row_stride(gradient), row_stride(out),
            upstream.stride(0) if per_row else 0, BLOCK=SCALE_BLOCK, PER_ROW=per_row,
            IN_PLACE=overwrite, INTERPRETED=INTERPRETED, num_warps=8,
        )  # fmt: skip
    return out
