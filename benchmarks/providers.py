"""Who computes it. A provider turns a workload and its inputs into one call to be timed.

``PROVIDERS`` is the registry: a new contender (a GPU backend, a peer library) is one entry, and
kdkernels' backends enter by themselves. Eager formulas are written here as a user of PyTorch would
write them, without the guards that kdkernels' own formulas carry.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels
from kdkernels import divergences, fused_kd_loss, fused_linear_kd_loss, fused_topk_kd_loss
from kdkernels.backends import BACKENDS
from kdkernels.backends.base import empty_gradient
from kdkernels.dispatch import choose_backend
from kdkernels.linear import MAX_CHUNK_BYTES

from .workloads import (
    DTYPES,
    EAGER_TENSORS,
    MOST_BYTES,
    Inputs,
    Workload,
    chunk_provider,
)


class Answer(NamedTuple):
    loss: Tensor | None  #: None: this provider computes the loss up to a constant only
    gradients: tuple[Tensor, ...] | None  #: of what is learnt; empty: none; None: a floor without


Step = Callable[[], Answer]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  #: student, teacher, labels -> loss


def _always(workload: Workload) -> str | None:
    return None


def _same(workload: Workload) -> Workload:
    return workload


@dataclass(frozen=True)
class Provider:
    """A contender.

    family: ``linear`` (from hidden states), ``topk`` (a sparse teacher, and its dense yardstick),
        ``chunk`` (``linear`` with tiles of another size), ``fused``, ``kernel`` (the backend called
        directly with a reused gradient buffer), ``eager``, ``upcast`` (eager in float32 on
        half-precision logits), ``compile``, ``chunked``, ``peer``, ``variant`` (a kernel that the
        environment forces) or ``graph`` (a CUDA graph of another provider's call: the device's time
        without that of Python).
    prepare: builds the call; whatever it does is not timed.
    why_not: the reason why it does not take part in a workload, or None.
    computes: the workload that it really computes, whose oracle it is held to: a yardstick run next
        to a different workload differs here.
    """

    name: str
    family: str
    prepare: Callable[[Workload, Inputs], Step]
    why_not: Callable[[Workload], str | None] = field(default=_always)
    computes: Callable[[Workload], Workload] = field(default=_same)
    device: str = ""  #: the only device on which it competes unasked; empty: all

    def absence(self, workload: Workload) -> str | None:
        """Why it does not take part in a workload: what the workload or the provider says."""
        reason = workload.excludes(self.name, self.family) or self.why_not(workload)
        needed = EAGER_TENSORS * workload.itemsize * workload.logits
        if not reason and workload.hidden and self.family in MATERIALISED and needed > MOST_BYTES:
            reason = f"tensors of logits would take up to {needed / 2**30:.0f} GiB"
        return reason


#: Families whose members make all logits where they are not given.
MATERIALISED = ("fused", "eager", "compile", "products")


def step_of(
    loss: Loss, workload: Workload, inputs: Inputs, *, up_to_constant: bool = False
) -> Step:
    """The call of a loss function on logits: forward and, if the workload has it, backward."""

    def on_inputs(leaves: Inputs) -> Tensor:
        return loss(*leaves.logits(), leaves.labels)

    return step_from(on_inputs, workload, inputs, up_to_constant=up_to_constant)


def step_from(
    loss: Callable[[Inputs], Tensor],
    workload: Workload,
    inputs: Inputs,
    *,
    up_to_constant: bool = False,
) -> Step:
    """The call of a loss of whatever is given."""
    leaves = inputs.leaves(workload.backward)

    def step() -> Answer:
        value = loss(leaves)
        if value.requires_grad:
            value.backward()
        return Answer(None if up_to_constant else value.detach(), _taken(leaves))

    return step


def _taken(leaves: Inputs) -> tuple[Tensor, ...]:
    """The gradients, which the leaves no longer have."""
    gradients = tuple(leaf.grad for leaf in leaves.learnt if leaf.grad is not None)
    for leaf in leaves.learnt:
        leaf.grad = None
    return gradients


# --- kdkernels ------------------------------------------------------------------------------------


def _fused(backend: str | None = None, gradient: str = "auto") -> Callable[..., Step]:
    def prepare(workload: Workload, inputs: Inputs) -> Step:
        def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            return fused_kd_loss(
                student,
                teacher,
                labels,
                temperature=workload.temperature,
                alpha=workload.alpha,
                divergence=workload.divergence,
                gradient=gradient,
                backend=backend,
            )

        return step_of(loss, workload, inputs)

    return prepare


def _other_mode(workload: Workload) -> str | None:
    return None if workload.backward else "there is no gradient to store or recompute"


def _prepare_stored(workload: Workload, inputs: Inputs) -> Step:
    """The gradient mode that ``"auto"`` does not take: it stores, except for float16."""
    mode = "forward" if workload.dtype == "fp16" else "recompute"
    return _fused(gradient=mode)(workload, inputs)


def _kernel(name: str | None = None) -> Callable[..., Step]:
    def prepare(workload: Workload, inputs: Inputs) -> Step:
        """A backend's kernel alone: no checks, no op, no autograd, the gradient's memory reused."""
        problem = workload.problem(inputs)
        backend = BACKENDS[choose_backend(problem, name)]
        backend.prepare(problem)
        buffer = empty_gradient(inputs.student) if workload.backward else None

        def step() -> Answer:
            result = backend.forward(
                problem, want_gradient=workload.backward, extras=False, gradient_out=buffer
            )
            return Answer(result.loss, () if result.gradient is None else (result.gradient,))

        return step

    return prepare


def _variant(kernel: str, cluster: int) -> Callable[..., Step]:
    """The CUDA backend's kernel, forced; what the device or the shape forbids fails by name."""
    forced = {"KDKERNELS_CUDA_KERNEL": kernel, "KDKERNELS_CUDA_CLUSTER": str(cluster)}

    def prepare(workload: Workload, inputs: Inputs) -> Step:
        step = _kernel("cuda")(workload, inputs)

        def under_force() -> Answer:
            before = {name: os.environ.get(name) for name in forced}
            os.environ.update(forced)  # two microseconds
            try:
                return step()
            finally:
                for name, value in before.items():
                    if value is None:
                        del os.environ[name]
                    else:
                        os.environ[name] = value

        return under_force

    return prepare


def _graph(prepare_call: Callable[..., Step]) -> Callable[..., Step]:
    """A replay of the call, captured once: the same kernels without the host's work."""

    def prepare(workload: Workload, inputs: Inputs) -> Step:
        step = prepare_call(workload, inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # what a first call allocates and compiles is not captured
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = step()

        def replay() -> Answer:
            graph.replay()
            return answer

        return replay

    return prepare


def _no_graph(workload: Workload) -> str | None:
    return None if torch.cuda.is_available() else "a CUDA graph needs a CUDA device"


def _prepare_linear(
    max_chunk_bytes: int | None = None, backend: str | None = None
) -> Callable[..., Step]:
    def prepare(workload: Workload, inputs: Inputs) -> Step:
        def loss(given: Inputs) -> Tensor:
            return fused_linear_kd_loss(
                given.student,
                given.student_weight,
                given.teacher,
                given.teacher_weight,
                given.labels,
                temperature=workload.temperature,
                alpha=workload.alpha,
                divergence=workload.divergence,
                max_chunk_bytes=max_chunk_bytes,
                backend=backend,
            )

        return step_from(loss, workload, inputs)

    return prepare


def _prepare_products(workload: Workload, inputs: Inputs) -> Step:
    """The bare matrix products, their results' memory reused, and the loss on given logits.

    What a fused loss from hidden states cannot do without.
    """
    student, teacher, labels, weight, teacher_weight = inputs[:5]
    assert weight is not None and teacher_weight is not None
    logits, theirs = (student.new_empty(workload.rows, workload.vocab) for _ in range(2))
    to_hidden, to_weight = torch.empty_like(student), torch.empty_like(weight)
    step_on_logits = _fused()(workload, Inputs(logits, theirs, labels))

    def step() -> Answer:
        torch.mm(student, weight.t(), out=logits)
        torch.mm(teacher, teacher_weight.t(), out=theirs)
        loss, gradients = step_on_logits()
        if not gradients:
            return Answer(loss, ())
        torch.mm(gradients[0], weight, out=to_hidden)
        torch.mm(gradients[0].t(), student, out=to_weight)
        return Answer(loss, (to_hidden, to_weight))

    return step


def _prepare_bare_products(workload: Workload, inputs: Inputs) -> Step:
    """The matrix products alone, on whatever the memory for logits holds: there is no answer."""
    student, teacher, _, weight, teacher_weight = inputs[:5]
    assert weight is not None and teacher_weight is not None
    logits, theirs = (student.new_zeros(workload.rows, workload.vocab) for _ in range(2))
    to_hidden, to_weight = torch.empty_like(student), torch.empty_like(weight)

    def step() -> Answer:
        torch.mm(student, weight.t(), out=logits)
        torch.mm(teacher, teacher_weight.t(), out=theirs)
        torch.mm(logits, weight, out=to_hidden)
        torch.mm(logits.t(), student, out=to_weight)
        return Answer(None, None)

    return step


def _no_floor(workload: Workload) -> str | None:
    # On a CPU without such products, that is; on a GPU they are what there is.
    if workload.dtype == "fp32" or torch.cuda.is_available():
        return None
    return "bare products in half precision are no floor"


def _no_kernel(workload: Workload) -> str | None:
    """Every backend but these is a kernel."""
    able = [name for name, why in kdkernels.available_backends().items() if not why]
    return None if set(able) - {"torch", "reference"} else "no native backend is available"


def _no_yardstick(workload: Workload) -> str | None:
    if workload.group != "divergence" or workload.divergence == "forward_kl":
        return "the yardstick of the other divergences"
    return _no_kernel(workload)


def _forward_kl(workload: Workload) -> Workload:
    return replace(workload, divergence="forward_kl")


# --- eager PyTorch --------------------------------------------------------------------------------


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def _mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.log(0.5 * log_p.exp() + 0.5 * log_q.exp())


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    mixture = _mixture(log_p, log_q)
    of_p, of_q = (
        F.kl_div(mixture, side, reduction="batchmean", log_target=True) for side in (log_p, log_q)
    )
    return 0.5 * of_p + 0.5 * of_q


def _tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()


def _skew_forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(_mixture(log_p, log_q), log_p, reduction="batchmean", log_target=True)


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(_mixture(log_p, log_q), log_q, reduction="batchmean", log_target=True)


def _alpha_beta(log_p: Tensor, log_q: Tensor) -> Tensor:
    a, b = divergences.AlphaBeta().parameters
    joint = torch.exp(a * log_p + b * log_q)
    ends = a / (a + b) * torch.exp((a + b) * log_p) + b / (a + b) * torch.exp((a + b) * log_q)
    return -((joint - ends).sum(-1).mean()) / (a * b)


def _forward_kl_log_target(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


#: Mean over rows of the divergence of log-probabilities, as plain PyTorch.
EAGER_FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _forward_kl_log_target,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "alpha_beta": _alpha_beta,
}


def eager_loss(workload: Workload, *, upcast: bool = False, softmax_target: bool = False) -> Loss:
    """The loss in eager PyTorch; ``softmax_target`` hands kl_div probabilities (forward KL)."""
    temperature, alpha = workload.temperature, workload.alpha
    formula = EAGER_FORMULAS[workload.divergence]

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        if upcast:
            student, teacher = student.float(), teacher.float()
        log_q = F.log_softmax(student / temperature, -1)
        if softmax_target:
            p = F.softmax(teacher / temperature, -1)
            divergence = F.kl_div(log_q, p, reduction="batchmean")
        else:
            divergence = formula(F.log_softmax(teacher / temperature, -1), log_q)
        cross_entropy = F.cross_entropy(student, labels)
        return alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy

    return loss


def _eager(compiled: bool = False, **form: bool) -> Callable[..., Step]:
    def prepare(workload: Workload, inputs: Inputs) -> Step:
        loss = eager_loss(workload, **form)
        if compiled:
            loss = torch.compile(loss, dynamic=False)
        return step_of(loss, workload, inputs)

    return prepare


def _topk(backend: str | None = None) -> Callable[..., Step]:
    def prepare(workload: Workload, inputs: Inputs) -> Step:
        def loss(leaves: Inputs) -> Tensor:
            assert leaves.ids is not None and leaves.log_probs is not None
            value = fused_topk_kd_loss(
                leaves.student,
                leaves.ids,
                leaves.log_probs,
                leaves.labels,
                temperature=workload.temperature,
                alpha=workload.alpha,
                divergence=workload.divergence,
                backend=backend,
            )
            assert isinstance(value, Tensor)
            return value

        return step_from(loss, workload, inputs)

    return prepare


def _prepare_eager_topk(workload: Workload, inputs: Inputs) -> Step:
    """Gathered log-probabilities and one category for the rest; forward KL."""
    temperature, alpha = workload.temperature, workload.alpha

    def loss(leaves: Inputs) -> Tensor:
        assert leaves.ids is not None and leaves.log_probs is not None
        log_q = F.log_softmax(leaves.student.float() / temperature, -1).gather(-1, leaves.ids)
        log_p = leaves.log_probs
        p_rest, q_rest = (1 - x.exp().sum(-1, keepdim=True) for x in (log_p, log_q))
        log_p = torch.cat([log_p, p_rest.clamp(min=1e-9).log()], -1)
        log_q = torch.cat([log_q, q_rest.clamp(min=1e-9).log()], -1)
        kd = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        ce = F.cross_entropy(leaves.student.float(), leaves.labels)
        return alpha * temperature**2 * kd + (1 - alpha) * ce

    return step_from(loss, workload, inputs)


def _all_entries(workload: Workload) -> Workload:
    return replace(workload, entries=0)


def _only_forward_kl(workload: Workload) -> str | None:
    return None if workload.divergence == "forward_kl" else "forward KL only"


def _only_half(workload: Workload) -> str | None:
    return None if DTYPES[workload.dtype].itemsize == 2 else "the logits are in float32 already"


def _prepare_chunked(workload: Workload, inputs: Inputs) -> Step:
    """Eager on 8 chunks of rows, each in float32: bounded temporaries, autograd through all."""
    whole = eager_loss(workload, upcast=True)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        chunks = zip(*(t.chunk(8) for t in (student, teacher, labels)), strict=True)
        parts = [whole(*chunk) * (len(chunk[2]) / len(labels)) for chunk in chunks]
        return torch.stack(parts).sum()

    return step_of(loss, workload, inputs)


def _prepare_chunked_linear(workload: Workload, inputs: Inputs) -> Step:
    """Eager PyTorch on chunks of rows, each with its own backward: no whole logits.

    As many rows a chunk as fused_linear_kd_loss takes by default.
    """
    whole = eager_loss(workload, upcast=True, softmax_target=True)
    rows = max(1, MAX_CHUNK_BYTES // (2 * 4 * workload.vocab))
    leaves = inputs.leaves(workload.backward)

    def step() -> Answer:
        total = leaves.student.new_zeros((), dtype=torch.float32)
        chunks = zip(*(t.split(rows) for t in leaves[:3] if t is not None), strict=True)
        for student, teacher, labels in chunks:
            part = leaves._replace(student=student, teacher=teacher)
            loss = whole(*part.logits(), labels) * (len(labels) / workload.rows)
            if workload.backward:
                loss.backward()
            total += loss.detach()
        return Answer(total, _taken(leaves))

    return step


# --- peers, if installed --------------------------------------------------------------------------


def _missing(module: str) -> str | None:
    try:
        found = importlib.util.find_spec(module)
    except ImportError:  # of its package
        found = None
    return None if found else f"{module} is not installed"


def _no_torchtune(workload: Workload) -> str | None:
    return _missing("torchtune") or _only_forward_kl(workload)


def _prepare_torchtune(workload: Workload, inputs: Inputs) -> Step:
    """torchtune's KL has no temperature and leaves the teacher's entropy out of the loss."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss  # type: ignore

    module = ForwardKLWithChunkedOutputLoss(num_output_chunks=8)
    temperature, alpha = workload.temperature, workload.alpha

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        students, teachers = ((t / temperature).chunk(8) for t in (student, teacher))
        # One sequence whose tokens are the rows: [1, rows / 8, vocab] each.
        divergence = module(
            [s[None] for s in students], [t[None] for t in teachers], labels[None].contiguous()
        )
        cross_entropy = F.cross_entropy(student, labels)
        return alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy

    return step_of(loss, workload, inputs, up_to_constant=True)


def _no_liger(workload: Workload) -> str | None:
    if not torch.cuda.is_available():
        return _missing("liger_kernel") or "Liger's losses on given logits are Triton kernels"
    return _missing("liger_kernel") or _only_forward_kl(workload)


def _prepare_liger(workload: Workload, inputs: Inputs) -> Step:
    from liger_kernel.transformers import (  # type: ignore
        LigerCrossEntropyLoss,
        LigerKLDIVLoss,
    )

    kl, cross_entropy = LigerKLDIVLoss(), LigerCrossEntropyLoss()
    temperature, alpha = workload.temperature, workload.alpha

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(student / temperature, -1)
        divergence = kl(log_q, F.softmax(teacher / temperature, -1))
        # Its cross-entropy overwrites the logits with their gradient, hence a copy.
        ce = cross_entropy(student.clone(), labels)
        return alpha * temperature**2 * divergence + (1 - alpha) * ce

    return step_of(loss, workload, inputs)


def _divergence_alone(workload: Workload) -> Workload:
    return replace(workload, alpha=1.0)


def _prepare_liger_jsd(workload: Workload, inputs: Inputs) -> Step:
    """JSD with beta = 0 is the forward KL; it has no other term."""
    from liger_kernel.transformers import LigerJSD  # type: ignore

    jsd, temperature = LigerJSD(beta=0.0), workload.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        logs = (F.log_softmax(t.float() / temperature, -1) for t in (student, teacher))
        return temperature**2 * jsd(*logs)

    return step_of(loss, workload, inputs)


def _no_speculators(workload: Workload) -> str | None:
    if not torch.cuda.is_available():
        return "speculators' fused losses are Triton kernels"
    if workload.temperature != 1:
        return "speculators' losses have no temperature"
    return _missing("speculators.losses.fused") or _only_forward_kl(workload)


def _prepare_speculators(workload: Workload, inputs: Inputs) -> Step:
    from speculators.losses.fused import fused_kl_div_loss  # type: ignore

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        mean: Tensor = fused_kl_div_loss(student[None], teacher[None]).mean()
        return mean

    return step_of(loss, workload, inputs)


def _no_liger_linear(workload: Workload) -> str | None:
    return _missing("liger_kernel.chunked_loss") or _only_forward_kl(workload)


def _prepare_liger_linear(workload: Workload, inputs: Inputs) -> Step:
    """Its own chunks of rows, through torch.compile; its weights make it this workload's loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore

    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - workload.alpha,
        weight_soft_loss=workload.alpha * workload.temperature**2,
        beta=0.0,
        temperature=workload.temperature,
        compiled=inputs.student.is_cuda,
    )

    def loss(given: Inputs) -> Tensor:
        found = fused(
            given.student, given.student_weight, given.teacher, given.teacher_weight, given.labels
        )
        total: Tensor = found[0] if isinstance(found, tuple) else found
        return total

    return step_from(loss, workload, inputs)


def _no_trl_linear(workload: Workload) -> str | None:
    return _missing("trl.kernels.chunked_divergence") or _only_forward_kl(workload)


def _prepare_trl_linear(workload: Workload, inputs: Inputs) -> Step:
    """The divergence of each row, without T^2 and without cross-entropy."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # type: ignore

    temperature = workload.temperature

    def loss(given: Inputs) -> Tensor:
        of_student, of_teacher = given.student_weight, given.teacher_weight
        rows, _ = ChunkedDivergenceFunction.apply(
            given.student, of_student, None, given.teacher, of_teacher, None, 0.0, temperature
        )
        scaled: Tensor = temperature**2 * rows.mean()
        return scaled

    return step_from(loss, workload, inputs)


def _no_fla_linear(workload: Workload) -> str | None:
    if not torch.cuda.is_available():
        return "fla's losses are Triton kernels"
    return _missing("fla.modules.fused_kl_div") or _only_forward_kl(workload)


def _prepare_fla_linear(workload: Workload, inputs: Inputs) -> Step:
    """It has no temperature: hidden states divided by it have the same logits as the loss wants."""
    from fla.modules.fused_kl_div import fused_kl_div_loss  # type: ignore

    temperature = workload.temperature

    def loss(given: Inputs) -> Tensor:
        student, teacher = (hidden / temperature for hidden in (given.student, given.teacher))
        divergence: Tensor = fused_kl_div_loss(
            student, teacher, given.student_weight, given.teacher_weight
        )
        return temperature**2 * divergence

    return step_from(loss, workload, inputs)


# --- the registry ---------------------------------------------------------------------------------


def _not_available(backend: str) -> Callable[[Workload], str | None]:
    def why_not(workload: Workload) -> str | None:
        return "; ".join(kdkernels.available_backends()[backend]) or None

    return why_not


def _registry() -> dict[str, Provider]:
    entries = [
        Provider("fused", "fused", _fused()),
        Provider("fused_other_mode", "fused", _prepare_stored, _other_mode),
        Provider("kernel", "kernel", _kernel(), _no_kernel),
        Provider("kernel_forward_kl", "kernel", _kernel(), _no_yardstick, _forward_kl),
        Provider("eager", "eager", _eager(softmax_target=True), _only_forward_kl),
        Provider("eager_log_target", "eager", _eager()),
        Provider("eager_fp32", "upcast", _eager(upcast=True), _only_half),
        Provider("compile", "compile", _eager(True, softmax_target=True), _only_forward_kl),
        Provider("compile_log_target", "compile", _eager(True)),
        Provider("compile_fp32", "compile", _eager(True, upcast=True), _only_half),
        Provider("chunked", "chunked", _prepare_chunked),
        Provider("fused_topk", "topk", _topk()),
        Provider("eager_topk", "topk", _prepare_eager_topk, _only_forward_kl),
        Provider("fused_dense", "topk", _fused(), computes=_all_entries),
        Provider("fused_linear", "linear", _prepare_linear()),
        Provider("products", "products", _prepare_products, _no_floor),
        Provider("chunked_linear", "linear", _prepare_chunked_linear, _only_forward_kl),
        *(
            Provider(chunk_provider(size << 20), "chunk", _prepare_linear(size << 20))
            for size in (32, 64, 128, 256, 512, 1024)
        ),
        *(
            Provider(
                f"fused_{name}",
                "chunked" if name == "torch" else "fused",
                _fused(name),
                _not_available(name),
            )
            # "cpu" is what "fused" takes on this device; the oracle is no contender.
            for name in BACKENDS
            if name not in ("cpu", "reference")
        ),
        Provider("torchtune", "peer", _prepare_torchtune, _no_torchtune),
        Provider("liger", "peer", _prepare_liger, _no_liger),
        *_gpu_entries(),
    ]
    return {provider.name: provider for provider in entries}


#: What the environment can force, most interesting first: kernel, blocks of a cluster (0: chosen).
VARIANTS = (
    *((kernel, blocks) for kernel in ("registers", "shared") for blocks in (0, 1, 2, 4, 8, 16)),
    ("stream", 0),
)


def variant_provider(kernel: str, cluster: int) -> str:
    """The name of the provider that forces this kernel."""
    return f"kernel_{kernel}" + (f"_{cluster}" if cluster else "")


def _gpu_entries() -> list[Provider]:
    """What competes where there is a GPU, besides the others."""
    entries = [
        *(
            Provider(f"kernel_{name}", "kernel", _kernel(name), _not_available(name))
            for name in BACKENDS
            if name not in ("cpu", "torch", "reference")
        ),
        *(
            Provider(
                variant_provider(*variant), "variant", _variant(*variant), _not_available("cuda")
            )
            for variant in VARIANTS
        ),
        *(
            Provider(f"fused_topk_{name}", "topk", _topk(name), _not_available(name))
            for name in ("cuda", "triton")
        ),
        *(
            Provider(f"graph_{kind}_{name}", "graph", _graph(prepare(name)), _no_graph)
            for name in ("cuda", "triton")
            for kind, prepare in (("fused", _fused), ("kernel", _kernel))
        ),
        Provider("liger_jsd", "peer", _prepare_liger_jsd, _no_liger, _divergence_alone),
        Provider("speculators", "peer", _prepare_speculators, _no_speculators, _divergence_alone),
        Provider("bare_products", "products", _prepare_bare_products, _no_floor),
        Provider(
            "fused_linear_triton",
            "linear",
            _prepare_linear(backend="triton"),
            _not_available("triton"),
        ),
        *(
            Provider(chunk_provider(size << 20), "chunk", _prepare_linear(size << 20))
            for size in (2048, 4096)
        ),
        Provider("liger_linear", "linear", _prepare_liger_linear, _no_liger_linear),
        Provider("fla_linear", "linear", _prepare_fla_linear, _no_fla_linear, _divergence_alone),
        Provider("trl_linear", "linear", _prepare_trl_linear, _no_trl_linear, _divergence_alone),
    ]
    return [replace(provider, device="cuda") for provider in entries]


PROVIDERS = _registry()


def unasked(device: str) -> list[Provider]:
    """Those that compete on a device where nobody names others."""
    return [p for p in PROVIDERS.values() if p.device in ("", device)]
