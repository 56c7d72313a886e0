"""From a problem to launches of the Triton kernels."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import STATISTICS, Options, Problem, RowLayout, row_layout
from ..base import Result, empty_gradient, row_stride
from ..gpu import label_errors
from . import entries, exchange, functors, policy, row, small
from .arguments import Facts, Kept, Numbers, Sizes, Tensors
from .policy import (
    Device,
    Entries,
    Functor,
    Given,
    LaunchPolicy,
    Sharing,
    Side,
    Stages,
    Terms,
    Tile,
    Variant,
)

#: Whether Triton interprets its kernels on the CPU; decided when the kernels are imported.
INTERPRETED: bool = triton.knobs.runtime.interpret


def asked_to_interpret() -> bool:
    """Whether TRITON_INTERPRET is set now; the kernels are what it was when they were imported."""
    return bool(triton.knobs.runtime.interpret)


#: Of every launch. Triton 3.9 warns where it is left open, and 3.10 leaves it out: a fused multiply
#: and add is one instruction of two (at T = 2 33.3 instead of 36.1 an element, 132 of 160 for JSD).
FUSED = {"enable_fp_fusion": True}

#: Triton's releases whose compiled kernels depend on nothing but what :func:`_start` compares.
_REUSES = torch.version.hip is None and (
    (3, 5) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= (3, 9)
)
_compiled: dict[tuple[Any, ...], Any] = {}


def _start(
    function: Any, grid: tuple[int], tensors: tuple[Tensor | None, ...], integers: tuple[int, ...],
    floats: tuple[float, ...], constants: tuple[Any, ...], **options: Any,
) -> None:  # fmt: skip
    """Launch ``function`` with the tensors, numbers and constants in this order.

    A launch through Triton looks at every argument to find the compiled kernel. On NVIDIA it is
    compiled for dtypes, for addresses that are multiples of 16, and for integers of 32 or 64 bits
    (none of which the kernels specialise further): from the second time on what these say is
    launched without looking again. AMD's compiler also asks for sizes, and goes through Triton.
    """
    arguments = (*tensors, *integers, *floats, *constants)
    first = tensors[0]
    if first is None or not first.is_cuda or not _REUSES:
        function[grid](*arguments, **FUSED, **options)
        return
    key = (
        function.__name__, first.device.index, constants, tuple(options.items()),
        tuple([None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]),
        tuple([-(1 << 31) <= n < 1 << 31 for n in integers]),
    )  # fmt: skip
    kernel = _compiled.get(key)
    if kernel is None:
        _compiled[key] = function[grid](*arguments, **FUSED, **options)
    else:
        kernel[(*grid, 1, 1)](*arguments)


class Constants:
    """A Variant, or a group of its fields, as the kernels see it: equal and cached by its text."""

    def __init__(self, variant: Any, fields: dict[str, Any]) -> None:
        self.variant = variant
        self._text = repr(variant)
        for name, given in fields.items():
            group = isinstance(given, tuple)
            value = Constants(given, given._asdict()) if group else given
            setattr(self, name, value if INTERPRETED else tl.constexpr(value))

    def __repr__(self) -> str:
        return self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._text == other._text


@functools.lru_cache(maxsize=256)
def _constants(variant: Variant | Entries) -> Constants:
    return Constants(variant, variant.constants())


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


#: Programs of a processor that read a sparse teacher's entries; each waits most of its time.
ENTRIES_PROGRAMS = 8


class Launch:
    """The launches of one problem: its arguments, and the variants of the row kernel they need."""

    def __init__(
        self, problem: Problem, device: Device, sweeps: int, launch_policy: LaunchPolicy | None
    ) -> None:
        self.problem = problem
        self.options = problem.options
        self.device = device
        self.sparse = problem.teacher_ids is not None
        self.layout = _layout(problem)
        self.student, self.teacher = self.layout.tensors
        models = (self.student,) if self.sparse else (self.student, self.teacher)
        sizes = [model.element_size() for model in models]
        self.width = 16 // min(sizes)
        self.facts = {
            "rows": problem.rows,
            "vocab": problem.vocab,
            "row_bytes": problem.vocab * sum(sizes),
            "width": self.width,
            "sweeps": sweeps,
            "heaviness": _heaviness(problem),
        }
        self.policy = launch_policy or self._policy()
        self.columns: Tensor | None = None
        self.facts_of_teacher: Tensor | None = None
        self.items: Tensor | None = None
        self.row_factor = 1.0
        self._denominator()

    @property
    def key(self) -> str:
        """What a measured launch is kept under."""
        return policy.key(self.device, **self.facts)

    def _policy(self) -> LaunchPolicy:
        if not self.sparse:
            return self._measured() or policy.choose(self.device, **self.facts)
        facts = {name: fact for name, fact in self.facts.items() if name != "sweeps"}
        return policy.choose_whole(self.device, **facts)

    def _measured(self) -> LaunchPolicy | None:
        """From the user's file; a text to look it up is made only where there is one."""
        if not policy.all_tuned():
            return None
        return policy.tuned(self.device, self.facts["rows"], self.key)

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
            self.row_factor = 1.0 / max(self.facts["rows"], 1)
        else:
            self.items = torch.empty((), dtype=torch.float32, device=self.student.device)
            integers = (self.facts["rows"], options.ignore_index)
            _start(small.count_rows, (1,), (problem.labels, self.items), integers, (), (1024,))

    def read_entries(self, extras: bool) -> None:
        """One launch that makes of a sparse teacher what the row kernel takes."""
        ids = self.problem.teacher_ids
        if ids is None:
            return
        rows, count, teacher_rows = self.facts["rows"], ids.shape[-1], self.problem.teacher_rows
        self.columns = torch.empty_like(self.teacher, dtype=torch.int32)
        self.facts_of_teacher = self.student.new_empty(
            (rows, len(Facts._fields)), dtype=torch.float32
        )
        offsets = None if teacher_rows is None else teacher_rows * count
        tensors = (
            ids, self.problem.teacher, offsets, self.columns, self.teacher, self.facts_of_teacher
        )  # fmt: skip
        programs = min(rows, ENTRIES_PROGRAMS * self.device.processors)
        constants = _constants(
            Entries(self.options.tail, _slots(self.problem), extras, offsets is not None)
        )
        integers = (rows, count, self.facts["vocab"])
        _start(entries.kd_entries, (programs,), tensors, integers, (), (constants,), num_warps=4)

    def case(self, gradient: Tensor | None, extras: bool, upstream: bool) -> Case:
        """What decides the variants of the row kernel."""
        problem, strides = self.problem, self.layout.strides
        teacher_phase, gradient_phase = _phases(self.layout, problem, self.width, gradient)
        # The student's memory may be the gradient's. 0 is a tensor without memory.
        own = self.student.data_ptr()
        written = own if gradient is None else gradient.data_ptr()
        return Case(
            options=self.options,
            device=self.device,
            policy=self.policy,
            rows=self.facts["rows"],
            vocab=self.facts["vocab"],
            width=self.width,
            itemsize=self.student.element_size(),
            extras=extras,
            with_labels=problem.labels is not None,
            with_items=self.items is not None,
            with_weights=problem.token_weights is not None,
            with_upstream=upstream,
            with_offsets=self.layout.offsets is not None,
            with_gradient=gradient is not None,
            in_place=gradient is not None and own != 0 and written == own,
            unit_student=strides[0][2] == 1,
            unit_teacher=strides[1][2] == 1,
            teacher_phase=teacher_phase,
            gradient_phase=gradient_phase,
            base_aligned=not (own | self.teacher.data_ptr() | written) % 16,
            truncated=gradient is not None and problem.student.shape[-1] > self.facts["vocab"],
            slots=_slots(problem),
        )

    def run(
        self, stage: Stage, loss: Tensor | None, statistics: Tensor, gradient: Tensor | None,
        partials: Tensor | None, upstream: Tensor | None,
    ) -> None:  # fmt: skip
        """One launch of the row kernel."""
        extra: dict[str, Any] = {}
        if self.policy.registers is not None:
            extra["maxnreg"] = self.policy.registers
        arrivals = None
        if stage.groups:
            arrivals = torch.zeros(stage.groups, dtype=torch.int32, device=self.student.device)
            extra["launch_cooperative_grid"] = True
        labels = self.problem.labels
        tensors = Tensors(
            student=self.student,
            teacher=self.teacher,
            labels=labels,
            weights=self.problem.token_weights,
            items=self.items,
            upstream=upstream,
            loss=loss,
            statistics=statistics,
            gradient=gradient,
            partials=partials,
            arrivals=arrivals,
            errors=None if labels is None else label_errors(self.student.device),
            columns=self.columns,
            facts=self.facts_of_teacher,
            offsets=self.layout.offsets,
        )
        _start(
            row.kd_rows, (stage.programs,), tensors, self._sizes(gradient, upstream),
            _numbers(self.options, self.row_factor), (stage.constants,),
            num_warps=self.policy.num_warps, **extra,
        )  # fmt: skip

    def _sizes(self, gradient: Tensor | None, upstream: Tensor | None) -> Sizes:
        student, teacher = self.layout.strides
        return Sizes(
            rows=self.facts["rows"],
            inner=self.layout.inner,
            vocab=self.facts["vocab"],
            width=self.problem.student.shape[-1],
            gradient_row=0 if gradient is None else row_stride(gradient),
            student_outer=student[0],
            student_inner=student[1],
            student_column=student[2],
            teacher_outer=teacher[0],
            teacher_inner=teacher[1],
            teacher_column=teacher[2],
            upstream_stride=0 if upstream is None or upstream.ndim == 0 else upstream.stride(0),
            ignore_index=self.problem.options.ignore_index,
            entries=self.teacher.shape[-1] if self.sparse else 0,
        )

    def forward(
        self, loss: Tensor, statistics: Tensor, gradient: Tensor | None, extras: bool,
        upstream: Tensor | None,
    ) -> None:  # fmt: skip
        """All launches of the row kernel that the policy's exchange needs."""
        launch = self.policy
        self.read_entries(extras)
        partials = None
        if launch.exchange != "none":
            many = launch.exchange == "launch"
            slots = self.facts["rows"] if many else 2 * (launch.programs // launch.split)
            partials = self.student.new_empty(
                (slots, exchange.PARTIALS.value, launch.split), dtype=torch.float32
            )
        for stage in _forward_stages(self.case(gradient, extras, upstream is not None)):
            self.run(stage, loss, statistics, gradient, partials, upstream)

    def backward(self, statistics: Tensor, gradient: Tensor, upstream: Tensor) -> None:
        """The one launch that starts where the forward ended."""
        self.read_entries(extras=False)
        stage = _backward_stage(self.case(gradient, False, upstream=True))
        self.run(stage, None, statistics, gradient, None, upstream)


@functools.lru_cache(maxsize=1024)
def _numbers(options: Options, row_factor: float) -> Numbers:
    first, second = (*options.parameters, 0.0, 0.0)[:2]
    numbers = Numbers(
        row_factor=row_factor,
        factor=math.log2(math.e) / options.temperature,
        temperature=options.temperature,
        kd_scale=options.kd_scale,
        alpha=options.alpha,
        smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        student_scale=options.student_scale,
        teacher_scale=options.teacher_scale,
        student_softcap=options.student_softcap,
        teacher_softcap=options.teacher_softcap,
        first=first,
        second=second,
    )
    # float(): a kernel compiled for an integer would not take another call's float.
    return Numbers._make(map(float, numbers))


class Case(NamedTuple):
    """What decides the variants of the row kernel: all but contents and addresses."""

    options: Options
    device: Device
    policy: LaunchPolicy
    rows: int
    vocab: int
    width: int
    itemsize: int
    extras: bool
    with_labels: bool
    with_items: bool
    with_weights: bool
    with_upstream: bool
    with_offsets: bool
    with_gradient: bool
    in_place: bool  # the gradient's memory is the student's
    unit_student: bool
    unit_teacher: bool
    teacher_phase: bool  # rows start where the student's do, see _phases
    gradient_phase: bool
    base_aligned: bool
    truncated: bool
    slots: int  # of a sparse teacher's entries, a power of two; 0: it is logits


class Stage(NamedTuple):
    """One launch of the row kernel."""

    constants: Constants
    programs: int
    groups: int  # of programs that wait for each other; 0: none does


def _stage(variant: Variant, programs: int) -> Stage:
    sharing = variant.sharing
    groups = programs // sharing.split if sharing.exchange == "spin" else 0
    return Stage(_constants(variant), programs, groups)


def _variant(case: Case) -> Variant:
    """The variant that does everything in one launch; callers replace its stages."""
    options, launch, device = case.options, case.policy, case.device
    labels = case.with_labels
    kd_in_loss = options.alpha != 0
    swept = (kd_in_loss or case.extras) and options.divergence in functors.SWEPT and not case.slots
    return Variant(
        interpreted=INTERPRETED,
        tile=Tile(launch.vectors, launch.num_warps * device.warp, case.width, case.itemsize),
        functor=Functor(options.divergence, _case(options), nvidia=device.kind == "cuda"),
        terms=Terms(
            power=_power(options),
            extras=case.extras,
            kd_in_loss=kd_in_loss,
            ce_in_loss=labels and options.alpha != 1,
            smoothing=labels and options.label_smoothing != 0,
            z_loss=options.z_loss != 0,
        ),
        student=Side(
            scale=options.student_scale != 1,
            softcap=options.student_softcap != 0,
            unit=case.unit_student,
            align=case.unit_student,
        ),
        teacher=Side(
            scale=options.teacher_scale != 1,
            softcap=options.teacher_softcap != 0,
            unit=case.unit_teacher,
            align=case.unit_student and case.teacher_phase,
        ),
        align_gradient=case.unit_student and case.gradient_phase,
        base_aligned=case.base_aligned,
        single=case.vocab == 1,
        truncated=case.truncated,
        given=Given(
            labels, case.with_items, case.with_weights, case.with_upstream, case.with_offsets
        ),
        stages=Stages(observe=True, evaluate=swept, finish=True, differentiate=case.with_gradient),
        sharing=Sharing(launch.exchange, split=launch.split, members=launch.split),
        tail=options.tail,
        slots=case.slots,
    )


@functools.lru_cache(maxsize=1024)
def _forward_stages(case: Case) -> tuple[Stage, ...]:
    """The launches of a forward, in order."""
    variant, launch = _variant(case), case.policy
    if launch.exchange != "launch":
        return (_stage(variant, launch.programs),)
    whole, none = variant.stages, Stages(False, False, False, False)
    quiet = variant._replace(truncated=False)
    launches = [_stage(quiet._replace(stages=none._replace(observe=True)), launch.programs)]
    if whole.evaluate:
        evaluates = quiet._replace(stages=none._replace(evaluate=True))
        launches.append(_stage(evaluates, launch.programs))
    # The student's memory may be the gradient's: then a row must be finished before any slice of it
    # is differentiated, since finishing reads the label's logit.
    rest = whole._replace(observe=False, evaluate=False)
    if case.in_place or not whole.differentiate:
        programs = min(case.rows, case.device.processors * launch.residents)
        alone = quiet._replace(
            stages=none._replace(finish=True), sharing=variant.sharing._replace(split=1)
        )
        launches.append(_stage(alone, programs))
        rest = rest._replace(finish=False)
    if whole.differentiate:
        launches.append(_stage(variant._replace(stages=rest), launch.programs))
    return tuple(launches)


@functools.lru_cache(maxsize=1024)
def _backward_stage(case: Case) -> Stage:
    variant = _variant(case)
    return _stage(
        variant._replace(
            stages=Stages(observe=False, evaluate=False, finish=False, differentiate=True),
            sharing=variant.sharing._replace(exchange="none"),
        ),
        case.policy.programs,
    )


def _layout(problem: Problem) -> RowLayout:
    """Of the student's rows, and of the teacher's: logits, or what is made of its entries."""
    if problem.teacher_ids is None:
        return row_layout(problem.student, problem.teacher, teacher_rows=problem.teacher_rows)
    shape = (*problem.leading_shape, problem.teacher_ids.shape[-1])
    return row_layout(problem.student, problem.student.new_empty(shape, dtype=torch.float32))


def _slots(problem: Problem) -> int:
    if problem.teacher_ids is None:
        return 0
    return int(triton.next_power_of_2(max(1, problem.teacher_ids.shape[-1])))


def _heaviness(problem: Problem) -> int:
    """The index of ``policy.TILES``: how much a thread has to hold per element."""
    options = problem.options
    swept = options.divergence in functors.SWEPT and problem.teacher_ids is None
    capped = options.student_softcap != 0 or options.teacher_softcap != 0
    reasons = swept + capped + (swept and options.divergence == "alpha_beta")
    return 1 + reasons if reasons else int(_power(options) == 0)


def _power(options: Options) -> int:
    """T where exp(z) is cheaply a power of exp(z / T), else 0."""
    temperature = options.temperature
    return int(temperature) if temperature in (1, 2, 3, 4) else 0


def _case(options: Options) -> str:
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
    same = teacher == student
    if layout.offsets is not None:  # any two rows may meet: all have to start alike
        steps = (*layout.strides[0][:2], *layout.strides[1][:2])
        same = teacher[0] == student[0] and not any(step % width for step in steps)
    same_teacher = layout.strides[1][2] == 1 and same
    if gradient is None:
        return same_teacher, False
    row = row_stride(gradient)
    own = starts(gradient, (row * layout.inner, row, 1))
    return same_teacher, own == student


def _by_row(grad_output: Tensor) -> Tensor:
    """[] or [rows]."""
    return grad_output.reshape(-1) if grad_output.ndim else grad_output


def forward(
    problem: Problem, *, want_gradient: bool, extras: bool, gradient_out: Tensor | None = None,
    grad_output: Tensor | None = None, device: Device | None = None,
    launch_policy: LaunchPolicy | None = None,
) -> Result:  # fmt: skip
    """``Backend.forward``; the last two arguments are for tests and tuning."""
    student, rows = problem.student, problem.rows
    reduce = problem.options.reduction != "none"
    shape = problem.leading_shape
    empty = functools.partial(torch.empty, dtype=torch.float32, device=student.device)
    statistics = empty((len(STATISTICS) + len(Kept._fields), *shape))
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
        upstream = None if grad_output is None else _by_row(grad_output)
        launch.forward(losses, statistics, gradient, extras, upstream)
        if not reduce:
            return Result(losses, statistics, gradient)
        loss = empty(())
        _start(small.sum_rows, (1,), (losses, loss), (rows,), (), (1024,))
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
    with _guard(problem.student):
        launch = Launch(problem, device or describe(problem.student), 1, launch_policy)
        launch.backward(statistics.contiguous(), gradient, _by_row(grad_output))
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
        # Not by _start: this kernel is compiled for what divides the width.
        small.scale_rows[(programs,)](
            gradient, out, upstream, rows, width, row_stride(gradient), row_stride(out),
            upstream.stride(0) if per_row else 0, BLOCK=SCALE_BLOCK, PER_ROW=per_row,
            IN_PLACE=overwrite, INTERPRETED=INTERPRETED, num_warps=8, **FUSED,
        )  # fmt: skip
    return out
