"""Inputs of the tests, the oracle, an independent statement of the formula, the accuracy rule.

Three things compute a loss here. ``oracle`` is the package's own reference in float64.
``plain_rows`` states the contract again in ordinary eager PyTorch without any code of the package;
in float64 it checks the oracle, in float32 it is the eager loss that a backend has to match in
accuracy. ``evaluate`` is the loss under test.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import divergences, fused_kd_loss
from kdkernels.backends import BACKENDS
from kdkernels.divergences import AlphaBeta, Divergence
from kdkernels.problem import Options, Problem

BETAS = {
    "jsd": (0.0, 0.1, 0.5, 0.9, 1.0),
    "skew_forward_kl": (0.0, 0.1, 0.5, 0.9),
    "skew_reverse_kl": (0.1, 0.5, 0.9, 1.0),
}
#: The general case, negative ones, and every limit: b = 0, a = 0, a + b = 0, a = b = 0.
ALPHA_BETAS = (
    (0.2, 0.7),
    (1.0, 0.0),
    (0.0, 1.0),
    (0.5, 0.0),
    (0.0, 0.6),
    (0.4, -0.4),
    (0.0, 0.0),
    (1.3, -0.5),
    (0.5, 0.5),
)
BUILT_IN = tuple(
    name
    for name in divergences.names()
    if type(divergences.resolve(name, 0.5)).__module__ == "kdkernels.divergences"
)


class Spec(NamedTuple):
    """One divergence as ``fused_kd_loss`` takes it."""

    name: str
    parameters: tuple[float, ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.parameters)])

    @property
    def arguments(self) -> dict[str, Any]:
        if self.name == "alpha_beta":
            return {"divergence": AlphaBeta(*self.parameters)}
        return {"divergence": self.name} | ({"beta": self.parameters[0]} if self.parameters else {})

    @property
    def object(self) -> Divergence:
        arguments = self.arguments
        return divergences.resolve(arguments["divergence"], arguments.get("beta", 0.5))


def _specs() -> tuple[Spec, ...]:
    specs = []
    for name in BUILT_IN:
        if name in BETAS:
            specs += [Spec(name, (beta,)) for beta in BETAS[name]]
        elif name == "alpha_beta":
            specs += [Spec(name, pair) for pair in ALPHA_BETAS]
        else:
            specs.append(Spec(name))
    return tuple(specs)


SPECS = _specs()
#: One of each name, for tests whose subject is not the divergence.
FEW = tuple(
    next(s for s in SPECS if s.name == n and s.parameters in ((), (0.5,), (0.2, 0.7)))
    for n in BUILT_IN
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
each_name = pytest.mark.parametrize("spec", FEW, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d)[6:])
each_mode = pytest.mark.parametrize("gradient", ("forward", "recompute"))


def _refusals(backend: str, probe: Tensor) -> list[str]:
    return BACKENDS[backend].why_not(Problem(probe, probe, None, None, None, Options()))


def device_of(backend: str) -> str:
    reasons = _refusals(backend, torch.zeros(1, 2))
    if not reasons:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return pytest.skip(f"{backend}: {'; '.join(reasons)}")


def needs_float64(backend: str, device: str) -> None:
    """Skip the test of a backend that computes in float32 only."""
    reasons = _refusals(backend, torch.zeros(1, 2, dtype=torch.float64, device=device))
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


# ------------------------------------------------------------------------------------ inputs


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    scale: float = 2.0,
    device: str = "cpu",
) -> Tensor:
    """Normal logits; the same numbers on every device."""
    return (torch.randn(shape, generator=generator(seed)) * scale).to(device, dtype)


def pair(
    shape: tuple[int, ...],
    student: torch.dtype = torch.float32,
    teacher: torch.dtype | None = None,
    *,
    seed: int = 0,
    scale: float = 2.0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    return (
        logits(shape, student, seed=2 * seed + 1, scale=scale, device=device),
        logits(shape, teacher or student, seed=2 * seed + 2, scale=scale, device=device),
    )


#: A vocabulary, and the columns of a row that it is padded to, as a tokenizer's 50257 to 50304:
#: then each row starts at a multiple of 16 bytes, in any dtype, and packed it would not.
PADDED = (67, 72)


def padded(packed: Tensor) -> Tensor:
    """The same logits in rows that are padded with NaN, as ``PADDED`` says."""
    vocab, columns = PADDED
    assert packed.shape[-1] == vocab
    rows = packed.new_full((*packed.shape[:-1], columns), math.nan)
    rows[..., :vocab] = packed
    return rows[..., :vocab]


def labels_for(
    shape: tuple[int, ...], vocab: int, *, seed: int = 0, ignored: float = 0.3, device: str = "cpu"
) -> Tensor:
    """int64 labels in [0, vocab), a share of them -100."""
    chance = generator(seed + 77)
    labels = torch.randint(vocab, shape, generator=chance)
    skip = torch.rand(shape, generator=chance) < ignored
    return torch.where(skip, -100, labels).to(device)


#: Hostile values that leave every loss finite: name -> what is done to (student, teacher).
def make_logits(kind: str, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """float32 (student, teacher) of a kind: how far apart, how large, how peaked."""
    scale = {"flat": 0.02, "normal": 2.0, "peaked": 12.0, "close": 2.0, "offset": 2.0}[kind]
    student, teacher = pair(shape, seed=seed, scale=scale)
    if kind == "close":
        teacher = student + 0.01 * teacher
    if kind == "offset":
        student, teacher = student + 300.0, teacher - 200.0
    return student, teacher


LOGIT_KINDS = ("normal", "flat", "peaked", "close", "offset")


# ------------------------------------------------------------------------------- the loss itself


class Evaluation(NamedTuple):
    loss: Tensor
    gradient: Tensor


def evaluate(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    backend: str | None = None,
    grad_output: Tensor | None = None,
    **options: Any,
) -> Evaluation:
    """Loss and gradient of a fresh leaf that has the student's strides.

    Where the backend declares that it cannot run the problem the test is skipped with the reasons.
    """
    leaf = student.detach().requires_grad_()
    loss = call(leaf, teacher, labels, backend=backend, **options)
    (gradient,) = torch.autograd.grad(
        loss, leaf, torch.ones_like(loss) if grad_output is None else grad_output
    )
    return Evaluation(loss.detach(), gradient)


def call(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
    """``fused_kd_loss``; a backend's declared refusal skips the test."""
    try:
        return fused_kd_loss(student, teacher, labels, **options)
    except RuntimeError as error:
        if "cannot run this problem" in str(error):
            pytest.skip(str(error))
        raise


def oracle(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options: Any
) -> Evaluation:
    """Loss and gradient in float64 by the reference, on the CPU, from exactly these inputs."""
    student, teacher = (t.detach().cpu().double() for t in (student, teacher))
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    options |= {"backend": "reference", "gradient": "forward"}
    return evaluate(student, teacher, None if labels is None else labels.cpu(), **options)


# --------------------------------------------------------------- the formula, independently


def plain_divergence(spec: Spec, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence of each row, written out with PyTorch's own losses where they exist."""
    name, parameters = spec
    beta = parameters[0] if parameters else 0.5

    def kl(log_target: Tensor, log_input: Tensor) -> Tensor:
        return F.kl_div(log_input, log_target, reduction="none", log_target=True).sum(-1)

    def mixture() -> Tensor:
        return torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))

    ends = {
        ("jsd", 0): "forward_kl",
        ("jsd", 1): "reverse_kl",
        ("skew_forward_kl", 0): "forward_kl",
        ("skew_reverse_kl", 1): "reverse_kl",
    }
    name = ends.get((name, beta), name)
    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "jsd":
        return beta * kl(log_p, mixture()) + (1 - beta) * kl(log_q, mixture())
    if name == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if name == "skew_forward_kl":
        return kl(log_p, mixture())
    if name == "skew_reverse_kl":
        return kl(log_q, mixture())
    assert name == "alpha_beta"
    return plain_alpha_beta(*parameters, log_p, log_q).sum(-1)


def plain_alpha_beta(a: float, b: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The five cases of Cichocki et al. 2011 as printed, in powers of p and q."""
    pa, qa, pb, qb = ((x * y).exp() for x in (a, b) for y in (log_p, log_q))
    if a == 0 and b == 0:
        return (log_p - log_q) ** 2 / 2
    if a == 0:
        return (qb * b * (log_q - log_p) - qb + pb) / b**2
    if b == 0:
        return (pa * a * (log_p - log_q) - pa + qa) / a**2
    if a + b == 0:
        return (a * (log_q - log_p) + pa / qa - 1) / a**2
    total = a + b
    powers = a / total * (total * log_p).exp() + b / total * (total * log_q).exp()
    return -(pa * qb - powers) / (a * b)


def _pair_of(option: Any) -> tuple[float | None, float | None]:
    return option if isinstance(option, tuple) else (option, option)


def plain_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    spec: Spec,
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    temperature_squared: bool = True,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: Any = None,
    **others: Any,
) -> Tensor:
    """Each row's loss ([N]) of logits [N, V] in their own dtype, all rows counted."""
    token_weights, logit_scale = others.get("token_weights"), others.get("logit_scale")
    vocab = min(student.shape[-1], teacher.shape[-1])
    capped = []
    for raw, scale, cap in zip(
        (student, teacher), _pair_of(logit_scale), _pair_of(logit_softcap), strict=True
    ):
        z = raw[..., :vocab]
        z = z if scale is None else z * scale
        capped.append(z if cap is None else cap * torch.tanh(z / cap))
    z_s, z_t = capped
    if alpha is None:
        alpha = 1.0 if labels is None else 0.5
    log_p, log_q = F.log_softmax(z_t / temperature, -1), F.log_softmax(z_s / temperature, -1)
    rows = alpha * plain_divergence(spec, log_p, log_q)
    rows = rows * temperature**2 if temperature_squared else rows
    if labels is not None and alpha != 1:
        ce = F.cross_entropy(z_s, labels, reduction="none", label_smoothing=label_smoothing)
        rows = rows + (1 - alpha) * ce
    rows = rows + z_loss * torch.logsumexp(z_s, -1) ** 2
    return rows if token_weights is None else rows * token_weights


class Flat(NamedTuple):
    """The rows of a problem as [N, V], and which of them count."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    weights: Tensor | None
    keep: Tensor
    leading: torch.Size


def flat(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    dtype: torch.dtype,
    shift: bool = False,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    **_: Any,
) -> Flat:
    """The rows that count, differentiably cut out of the logits."""
    if shift:
        student, teacher = student[:, :-1], teacher[:, :-1]
        labels = None if labels is None else labels[:, 1:]
        token_weights = None if token_weights is None else token_weights[:, 1:]
    leading = student.shape[:-1]
    z_s, z_t = (z.reshape(-1, z.shape[-1]).to(dtype) for z in (student, teacher))
    keep = torch.ones(z_s.shape[0], dtype=torch.bool)
    if labels is not None:
        labels = labels.reshape(-1).long()
        keep = labels != ignore_index
        labels = labels[keep]
    weights = None if token_weights is None else token_weights.reshape(-1)[keep].to(dtype)
    return Flat(z_s[keep], z_t[keep], labels, weights, keep, leading)


def denominator(
    keep: Tensor, reduction: str = "mean", num_items: float | Tensor | None = None, **_: Any
) -> float:
    """What the sum of the counted rows is divided by."""
    if reduction != "mean":
        return 1.0
    return float(keep.sum() if num_items is None else num_items) or 1.0


def plain(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    spec: Spec,
    *,
    dtype: torch.dtype,
    **options: Any,
) -> Evaluation:
    """Loss and gradient of the formula in ``dtype``, gradient rounded to the student's dtype."""
    leaf = student.detach().clone().requires_grad_()
    rows = flat(leaf, teacher, labels, dtype=dtype, **options)
    options["token_weights"] = rows.weights
    counted = plain_rows(rows.student, rows.teacher, rows.labels, spec, **options)
    if options.get("reduction", "mean") == "none":
        loss = torch.zeros(rows.keep.shape, dtype=dtype).masked_scatter(rows.keep, counted)
        loss = loss.reshape(rows.leading)
    else:
        loss = counted.sum() / denominator(rows.keep, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return Evaluation(loss.detach(), gradient)


# ---------------------------------------------------------------------------- the accuracy rule

ULPS = 4.0


def _rounding_of_divergence(
    spec: Spec, log_p: Tensor, log_q: Tensor, size_p: Tensor, size_q: Tensor
) -> tuple[Tensor, Tensor]:
    """(value, softmax gradient) entries' first-order error if log_p and log_q err by eps * size."""
    log_p, log_q = (log.detach().requires_grad_() for log in (log_p, log_q))
    value = spec.object.value(log_p, log_q)
    d_p, d_q = torch.autograd.grad(value.sum(), (log_p, log_q), create_graph=True)
    second: tuple[Tensor | None, ...] = (None, None)
    if d_q.requires_grad:
        second = torch.autograd.grad(d_q.sum(), (log_p, log_q), allow_unused=True)
    s_p, s_q = (torch.zeros_like(value) if s is None else s for s in second)
    d_p, d_q, value = (t.detach().abs() for t in (d_p, d_q, value))
    slope = d_q + s_p.abs() * size_p + s_q.abs() * size_q
    p, q = log_p.detach().exp(), log_q.detach().exp()
    eps = torch.finfo(torch.float32).eps
    if spec.name == "tvd":  # sign(q - p) is undecided within the rounding of p and q
        slope = slope + ((p - q).abs() <= ULPS * eps * (p * size_p + q * size_q)) * q / eps
    if spec.name.startswith("skew"):  # a softmax entry has an ulp of its own, though it cancels
        slope = slope + q * size_q
    through_sum = slope.sum(-1, keepdim=True) + size_q * d_q.sum(-1, keepdim=True)
    # Where p = q the first order vanishes and the second is what is left.
    second_order = eps / 2 * size_q * (s_p.abs() * size_p + s_q.abs() * size_q)
    return value + d_p * size_p + d_q * size_q + second_order, slope + q * through_sum


def noise(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    spec: Spec,
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    temperature_squared: bool = True,
    z_loss: float = 0.0,
    logit_softcap: Any = None,
    logit_scale: Any = None,
    label_smoothing: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What one relative rounding of the logits and log-probabilities does to each row's (loss,
    gradient), per unit of machine epsilon: the unit in which "a few ulp" is counted.

    For float64 logits [N, V], from the derivatives of the formula. The ulp of a sum is that of its
    terms, not of a result that cancelled.
    """
    vocab = min(student.shape[-1], teacher.shape[-1])
    if alpha is None:
        alpha = 1.0 if labels is None else 0.5
    cooked, sizes, logs = [], [], []
    for raw, scale, cap in zip(
        (student, teacher), _pair_of(logit_scale), _pair_of(logit_softcap), strict=True
    ):
        z = raw[..., :vocab] * (1.0 if scale is None else scale)
        cooked.append(z if cap is None else cap * torch.tanh(z / cap))
        logs.append(F.log_softmax(cooked[-1] / temperature, -1))
        sizes.append(1 + logs[-1].abs() + (cooked[-1] / temperature).abs())
    loss, gradient = _rounding_of_divergence(spec, logs[1], logs[0], sizes[1], sizes[0])
    squared = abs(alpha) * (temperature**2 if temperature_squared else 1.0)
    loss, gradient = squared * loss.sum(-1), squared / temperature * gradient
    z = cooked[0]
    lse, peak = torch.logsumexp(z, -1).abs(), z.abs().amax(-1)
    ce_weight = abs(1 - alpha) if labels is not None else 0.0
    loss = loss + (ce_weight + z_loss * lse) * (lse + peak)
    upstream = (ce_weight + 2 * z_loss * lse).unsqueeze(-1)
    gradient = gradient + upstream * F.softmax(z, -1) * (1 + z.abs() + lse.unsqueeze(-1))
    if labels is not None:
        gradient = gradient + ce_weight * label_smoothing / vocab
        one = torch.full_like(gradient[..., :1], ce_weight)
        gradient = gradient.scatter_add(-1, labels.unsqueeze(-1), one)
    scale = _pair_of(logit_scale)[0]
    gradient = gradient * abs(1.0 if scale is None else scale)
    return loss, F.pad(gradient, (0, student.shape[-1] - vocab))


def unit_of(
    student: Tensor, teacher: Tensor, labels: Tensor | None, spec: Spec, **options: Any
) -> Evaluation:
    """``noise`` in the shapes of (loss, gradient) of the whole problem."""
    rows = flat(student, teacher, labels, dtype=torch.float64, **options)
    loss, gradient = noise(rows.student, rows.teacher, rows.labels, spec, **options)
    if rows.weights is not None:
        loss, gradient = loss * rows.weights.abs(), gradient * rows.weights.abs()[:, None]
    divisor = denominator(rows.keep, **options)
    full = torch.zeros(*rows.keep.shape, student.shape[-1], dtype=torch.float64)
    full[rows.keep] = gradient / divisor
    full = full.reshape(*rows.leading, student.shape[-1])
    if options.get("shift"):
        full = F.pad(full, (0, 0, 0, 1))
    if options.get("reduction", "mean") != "none":
        return Evaluation(loss.sum() / divisor, full)
    per_row = torch.zeros(rows.keep.shape, dtype=torch.float64)
    per_row[rows.keep] = loss
    return Evaluation(per_row.reshape(rows.leading), full)


def eager_part(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(eager loss in ``dtype``, unit of its ulps), for one part of the loss."""
    if options.pop("no_ce", False):
        labels = None
    return (
        plain(student, teacher, labels, spec, dtype=dtype, **options).loss,
        unit_of(student, teacher, labels, spec, **options).loss,
    )


def assert_as_accurate(
    measured: Tensor, eager: Tensor, exact: Tensor, unit: Tensor, epsilon: float, what: str
) -> None:
    """THE accuracy rule: |measured - exact| <= the largest eager error + a few ulp.

    ``unit`` has the terms' magnitude; the ulp of the output's own dtype (half of it: correct
    rounding) is allowed on top. NaN and inf have to be where the oracle has them.
    """
    measured_64, exact = measured.detach().cpu().double(), exact.detach().cpu().double()
    if not exact.numel():
        return
    error = (measured_64 - exact).abs()
    eager_error = (eager.detach().cpu().double() - exact).abs().nan_to_num(0.0, 0.0)
    # The largest of the row stands for the row: an eager entry may be exact by luck.
    worst = eager_error.amax(-1, keepdim=True) if eager_error.ndim else eager_error
    info = torch.finfo(measured.dtype)
    rounding = (exact.abs() * info.eps / 2).clamp(min=info.smallest_normal * info.eps / 2)
    allowed = 1.01 * (worst + rounding) + ULPS * epsilon * unit
    same = (measured_64 == exact) | (measured_64.isnan() & exact.isnan())
    bad = ~(same | (error <= allowed))
    if bad.any():
        at = int(torch.where(bad, (error / allowed).nan_to_num(math.inf), -1.0).argmax())
        got, want, limit = (t.expand_as(error).flatten()[at] for t in (measured_64, exact, allowed))
        pytest.fail(
            f"{what}: {int(bad.sum())} of {bad.numel()} entries are off; the worst, at {at}, is "
            f"{got:.9g} for {want:.9g}: {(got - want).abs():.3g} off where {limit:.3g} is allowed"
        )


# --------------------------------------------------------------------------------- all-pairs


@dataclass(frozen=True)
class Case:
    """One point of the matrix: a value for each axis."""

    spec: Spec
    dtypes: tuple[torch.dtype, torch.dtype]
    shape: tuple[int, ...]
    kind: str
    temperature: float
    alpha: float | None
    with_labels: bool
    reduction: str
    gradient: str
    option: str
    seed: int

    def __str__(self) -> str:
        dtypes = "/".join(str(d).removeprefix("torch.") for d in self.dtypes)
        shape = "x".join(map(str, self.shape))
        labels = f"alpha{self.alpha}" if self.with_labels else "unlabelled"
        return (
            f"{self.spec} {dtypes} {shape} {self.kind} T{self.temperature} {labels} "
            f"{self.reduction} {self.gradient} {self.option}"
        )


DTYPE_PAIRS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float16),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
)
SHAPES = (
    (7,),
    (1, 1),
    (5, 1),
    (3, 2),
    (65, 7),
    (2, 3, 127),
    (9, 128),
    (2, 2, 1023),
    (3, 1024),
    (1, 1025),
    (2, 2, 3, 33),
    (4, 1, 16),
    (5, 4099),
    (2, 32001),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "unsquared": {"temperature_squared": False},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-3},
    "softcap": {"logit_softcap": 15.0},
    "softcap_pair": {"logit_softcap": (30.0, None)},
    "scale": {"logit_scale": 0.7},
    "scale_pair": {"logit_scale": (1.3, -0.5)},
    "scaled_and_capped": {"logit_scale": (0.5, 2.0), "logit_softcap": (None, 5.0)},
    "weights": {"token_weights": "tensor"},
    "items_number": {"num_items": 11},
    "items_tensor": {"num_items": "tensor"},
    "shift": {"shift": True},
    "shift_weights": {"shift": True, "token_weights": "tensor"},
    "shift_truncate": {"shift": True, "vocab_policy": "truncate", "extra": (2, 0), "z_loss": 1e-2},
    "ignore_index": {"ignore_index": 0},
    "student_larger": {"vocab_policy": "truncate", "extra": (5, 0)},
    "teacher_larger": {"vocab_policy": "truncate", "extra": (0, 3)},
    "everything": {
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "logit_scale": (0.9, 1.1),
        "logit_softcap": (20.0, 25.0),
        "token_weights": "tensor",
        "vocab_policy": "truncate",
        "extra": (1, 2),
    },
}
AXES: dict[str, tuple[Any, ...]] = {
    "spec": SPECS,
    "dtypes": DTYPE_PAIRS,
    "shape": SHAPES,
    "kind": LOGIT_KINDS,
    "temperature": (1.0, 0.05, 0.5, 2.0, 3.0, 4.0, 7.3),
    "labelling": ((None, False), (None, True), (0.0, True), (0.3, True), (1.0, True), (-0.5, True)),
    "reduction": ("mean", "sum", "none"),
    "gradient": ("auto", "forward", "recompute"),
    "option": tuple(OPTIONS),
}


def _possible(pick: dict[str, Any]) -> bool:
    option = OPTIONS[pick["option"]]
    with_labels = pick["labelling"][1]
    if "label_smoothing" in option and not with_labels:
        return False
    if "num_items" in option and pick["reduction"] != "mean":
        return False
    # A flat or scaled teacher next to a * b with a negative exponent is fine; -inf never occurs
    # here. The power q^-0.4 of a probability of e^-400 is not: no dtype holds it.
    wide = pick["kind"] == "peaked" or pick["temperature"] < 1
    if pick["spec"].name == "alpha_beta" and min(pick["spec"].parameters) < 0 and wide:
        return False
    return not option.get("shift") or len(pick["shape"]) == 3


@functools.cache
def all_pairs(seed: int = 2026, tries: int = 40) -> tuple[Case, ...]:
    """Cases in which every pair of values of two axes occurs together, where the two can."""
    chance = random.Random(seed)
    names = list(AXES)
    missing: set[tuple[str, int, str, int]] = set()
    for a, b in itertools.combinations(names, 2):
        missing |= {(a, i, b, j) for i in range(len(AXES[a])) for j in range(len(AXES[b]))}

    def pairs_of(at: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, at[a], b, at[b]) for a, b in itertools.combinations(names, 2)}

    picked, failures = [], 0
    order = sorted(missing)
    chance.shuffle(order)
    for a, i, b, j in order:
        if (a, i, b, j) not in missing:
            continue
        best: dict[str, int] | None = None
        gain = 0
        for _ in range(tries):
            at = {name: chance.randrange(len(AXES[name])) for name in names} | {a: i, b: j}
            if not _possible({name: AXES[name][at[name]] for name in names}):
                continue
            new = len(pairs_of(at) & missing)
            if new > gain:
                best, gain = at, new
        if best is None:
            failures += 1
            continue
        missing -= pairs_of(best)
        picked.append({name: AXES[name][best[name]] for name in names})
    return tuple(
        Case(
            alpha=pick["labelling"][0],
            with_labels=pick["labelling"][1],
            seed=index,
            **{name: pick[name] for name in names if name != "labelling"},
        )
        for index, pick in enumerate(picked)
    )


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    options: dict[str, Any]


def inputs_of(case: Case) -> Inputs:
    """The tensors and keyword arguments of one case, on the CPU."""
    options = dict(OPTIONS[case.option])
    extra_s, extra_t = options.pop("extra", (0, 0))
    *leading, vocab = case.shape
    widest = (*leading, vocab + max(extra_s, extra_t))
    student, teacher = make_logits(case.kind, widest, case.seed)
    student = student[..., : vocab + extra_s].to(case.dtypes[0]).contiguous()
    teacher = teacher[..., : vocab + extra_t].to(case.dtypes[1]).contiguous()
    labels = labels_for(tuple(leading), vocab, seed=case.seed) if case.with_labels else None
    if labels is not None and "ignore_index" in options:
        labels = labels.clamp(min=0)
    if options.get("token_weights"):
        options["token_weights"] = torch.rand(leading, generator=generator(case.seed)) * 2 - 0.5
    if options.get("num_items") == "tensor":
        options["num_items"] = torch.tensor([13.0])
    options |= {
        "temperature": case.temperature,
        "alpha": case.alpha,
        "reduction": case.reduction,
        "gradient": case.gradient,
    }
    return Inputs(student, teacher, labels, options | case.spec.arguments)


class Standard(NamedTuple):
    """What a result is measured by: the exact one, eager torch's, and the unit of the ulps."""

    exact: Evaluation
    eager: Evaluation
    unit: Evaluation
    epsilon: float


def standard(
    student: Tensor, teacher: Tensor, labels: Tensor | None, spec: Spec, **options: Any
) -> Standard:
    """For tensors on the CPU; ``options`` without the divergence's own arguments."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return Standard(
        oracle(student, teacher, labels, **options | spec.arguments),
        plain(student, teacher, labels, spec, dtype=dtype, **options),
        unit_of(student, teacher, labels, spec, **options),
        torch.finfo(dtype).eps,
    )


def assert_accurate(measured: Evaluation, by: Standard) -> None:
    """Loss and gradient obey the accuracy rule."""
    for what in ("loss", "gradient"):
        one, exact, eager, unit = (getattr(t, what) for t in (measured, *by[:3]))
        assert one.shape == exact.shape, what
        assert_as_accurate(one, eager, exact, unit, by.epsilon, what)
