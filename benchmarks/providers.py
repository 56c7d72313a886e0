"""Who computes it. A provider turns a workload and its inputs into one call to be timed.

``PROVIDERS`` is the registry: a new contender (a GPU backend, a peer library) is one entry, and
kdkernels' backends enter by themselves. Eager formulas are written here as a user of PyTorch would
write them, without the guards that kdkernels' own formulas carry.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels
from kdkernels import divergences, fused_kd_loss, fused_linear_kd_loss
from kdkernels.backends import BACKENDS
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
    gradients: tuple[Tensor, ...]  #: of what is learnt; empty: none


Step = Callable[[], Answer]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  #: student, teacher, labels -> loss


def _always(workload: Workload) -> str | None:
    return None


def _same(workload: Workload) -> Workload:
    return workload


@dataclass(frozen=True)
class Provider:
    """A contender.

    family: ``linear`` (from hidden states), ``chunk`` (the same with tiles of another size),
        ``fused``, ``kernel`` (the backend called directly with a reused gradient buffer),
        ``eager``, ``upcast`` (eager in float32 on half-precision logits), ``compile``, ``chunked``
        or ``peer``.
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


def _prepare_kernel(workload: Workload, inputs: Inputs) -> Step:
    """The backend's kernel alone: no checks, no op, no autograd, the gradient's memory reused."""
    problem = workload.problem(inputs)
    backend = BACKENDS[choose_backend(problem, None)]
    buffer = torch.empty_like(inputs.student) if workload.backward else None

    def step() -> Answer:
        result = backend.forward(
            problem, want_gradient=workload.backward, extras=False, gradient_out=buffer
        )
        return Answer(result.loss, () if result.gradient is None else (result.gradient,))

    return step


def _prepare_linear(max_chunk_bytes: int = MAX_CHUNK_BYTES) -> Callable[..., Step]:
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
            )

        return step_from(loss, workload, inputs)

    return prepare


def _prepare_products(workload: Workload, inputs: Inputs) -> Step:
    """The bare matrix products, their results' memory reused, and the loss on given logits.

    What a fused loss from hidden states cannot do without.
    """
    student, teacher, labels, weight, teacher_weight = inputs
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


def _only_float32(workload: Workload) -> str | None:
    return None if workload.dtype == "fp32" else "bare products in half precision are no floor"


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
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


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


# --- the registry ---------------------------------------------------------------------------------


def _not_available(backend: str) -> Callable[[Workload], str | None]:
    def why_not(workload: Workload) -> str | None:
        return "; ".join(kdkernels.available_backends()[backend]) or None

    return why_not


def _registry() -> dict[str, Provider]:
    entries = [
        Provider("fused", "fused", _fused()),
        Provider("fused_other_mode", "fused", _prepare_stored, _other_mode),
        Provider("kernel", "kernel", _prepare_kernel, _no_kernel),
        Provider("kernel_forward_kl", "kernel", _prepare_kernel, _no_yardstick, _forward_kl),
        Provider("eager", "eager", _eager(softmax_target=True), _only_forward_kl),
        Provider("eager_log_target", "eager", _eager()),
        Provider("eager_fp32", "upcast", _eager(upcast=True), _only_half),
        Provider("compile", "compile", _eager(True, softmax_target=True), _only_forward_kl),
        Provider("compile_log_target", "compile", _eager(True)),
        Provider("compile_fp32", "compile", _eager(True, upcast=True), _only_half),
        Provider("chunked", "chunked", _prepare_chunked),
        Provider("fused_linear", "linear", _prepare_linear()),
        Provider("products", "products", _prepare_products, _only_float32),
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
    ]
    return {provider.name: provider for provider in entries}


PROVIDERS = _registry()
