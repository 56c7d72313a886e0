"""Rows where the student is sure: its gradient there is a difference of numbers near 1.

At the student's largest entry ``slope - q * sum(slope)`` leaves what the other entries have: 1e-3
of either at a logit 15 above 2000 others, 1e-8 at one of 25. Rows like these are what training ends
with, and a gradient that has lost its digits there stops or pushes at random.
"""

from __future__ import annotations

import decimal
from decimal import Decimal
from typing import Any

import cases
import pytest
import torch
from cases import Spec
from torch import Tensor

from kdkernels.divergences import ForwardKL

VOCAB, TOP, OTHER = 2000, 1234, 9
TORN = ("tie", "three")
KINDS = ("same", "other", "unsure", "none", *TORN)


def sure(kind: str, gap: float, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    """One row of each. The student's logit at TOP is ``gap`` above the rest; the teacher is sure of
    the "same" token, of an "other" one, or "unsure". Or the student is torn between two tokens or
    "three", or the two have "none" of the tokens after TOP."""
    student, teacher = cases.pair((1, vocab), scale=1.0)
    student[0, TOP] += gap
    if kind == "same":
        teacher[0, TOP] += gap
    if kind in ("other", "tie"):
        teacher[0, OTHER] += gap
    if kind in ("tie", "three"):
        student[0, vocab - 1] = student[0, TOP]
    if kind == "three":
        student[0, TOP + 1] = student[0, TOP] - 0.3
    if kind == "none":
        teacher[0, TOP + 1 :] = student[0, TOP + 1 :] = -torch.inf
    return student, teacher


def error(got: Tensor, right: Tensor) -> float:
    return ((got.double() - right).abs().max() / right.abs().max()).item()


def bound(
    backend: str, spec: Spec, right: Tensor, eager: Tensor, *, one_token: bool, unit: float = 1.0
) -> float:
    """A few ulp of the row's largest gradient for the native CPU kernel.

    Where eager float32 has lost digits another backend may lose as many. The GPU kernels look for
    one sure token of a divergence that sums slopes, which forward KL and the label's terms do not:
    else the gradient is as good as a float's probability near 1, times ``unit``.
    """
    if backend in ("cpu", "reference"):
        # A power of a probability is as good as its logarithm, which of 2^-40 has 4e-6 in a float.
        return 4e-5 if spec.name == "alpha_beta" else 4e-6
    allowed = max(1e-5, 4 * error(eager, right))
    sums_slopes = one_token and not isinstance(spec.object, ForwardKL)
    if backend in ("triton", "cuda") and not sums_slopes:
        allowed = max(allowed, 2.0**-20 * unit / right.abs().max().item())
    return allowed


def check(
    backend: str,
    device: str,
    kind: str,
    gap: float,
    spec: Spec,
    labels: Tensor | None = None,
    least: float = 0.0,
    **options: Any,
) -> None:
    """The rule of ``bound``, or ``least`` if that is more."""
    temperature = options.get("temperature", 1.0)
    logits = sure(kind, gap * temperature)
    right = cases.oracle(*logits, labels, **spec.arguments, **options).gradient
    got = cases.evaluate(
        *(t.to(device) for t in logits),
        None if labels is None else labels.to(device),
        backend=backend,
        **spec.arguments,
        **options,
    ).gradient.cpu()
    eager = cases.plain(*logits, labels, spec, dtype=torch.float32, **options).gradient
    one_token = kind not in TORN and labels is None
    allowed = bound(backend, spec, right, eager, one_token=one_token, unit=temperature)
    assert error(got, right) <= max(least, allowed)


each_gap = pytest.mark.parametrize("gap", (15.0, 20.0, 25.0))


@cases.each_spec
@each_gap
def test_a_gradient_keeps_its_digits(backend: str, device: str, spec: Spec, gap: float) -> None:
    for kind in KINDS:
        for temperature in (1.0, 2.0):
            check(backend, device, kind, gap, spec, temperature=temperature)


@cases.each_name
@each_gap
@pytest.mark.parametrize(
    "options",
    (
        {"alpha": 0.3},
        {"alpha": 0.0},
        {"alpha": 0.5, "label_smoothing": 0.1, "temperature": 3.0},
        {"alpha": 0.5, "z_loss": 1e-3, "temperature": 1.7},
        # A capped logit has an error of its own, 4e-6 at 40, which becomes the others' share's.
        {"alpha": 1.0, "logit_softcap": 60.0, "least": 3e-4},
        {"alpha": 0.5, "logit_scale": 0.5, "temperature": 0.5},
    ),
    ids=str,
)
def test_with_a_label(
    backend: str, device: str, spec: Spec, gap: float, options: dict[str, Any]
) -> None:
    for kind in ("same", "other"):
        for label in (TOP, OTHER):
            check(backend, device, kind, gap, spec, torch.tensor([label]), **options)


@cases.each_name
@each_gap
def test_statistics_do_not_change_a_gradient(
    backend: str, device: str, spec: Spec, gap: float
) -> None:
    """With outputs the sweep is another one: reverse KL's differences are then the teacher's."""
    for kind in KINDS:
        student, teacher = (t.to(device) for t in sure(kind, gap))
        right = cases.oracle(student, teacher, **spec.arguments).gradient
        leaf = student.clone().requires_grad_()
        outputs = cases.call(leaf, teacher, backend=backend, return_outputs=True, **spec.arguments)
        outputs.loss.backward()
        assert leaf.grad is not None
        eager = cases.plain(student.cpu(), teacher.cpu(), None, spec, dtype=torch.float32).gradient
        allowed = bound(backend, spec, right.cpu(), eager, one_token=kind not in TORN)
        assert error(leaf.grad.cpu(), right.cpu()) <= allowed


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@cases.each_name
def test_in_half_precision_only_the_result_is_rounded(
    backend: str, device: str, spec: Spec, dtype: torch.dtype
) -> None:
    student, teacher = (t.to(dtype) for t in sure("other", 12.0))
    right = cases.oracle(student, teacher, **spec.arguments).gradient
    got = cases.evaluate(
        student.to(device), teacher.to(device), backend=backend, **spec.arguments
    ).gradient
    # float16's smallest step besides its 11 bits.
    step = 2.0**-24 / right.abs().max().item() if dtype == torch.float16 else 0.0
    assert error(got.cpu(), right) <= torch.finfo(dtype).eps + step


def exact_gradient(spec: Spec, student: list[float], teacher: list[float]) -> list[Decimal]:
    """The textbook formula with 60 digits."""

    def logs(logits: list[float]) -> list[Decimal]:
        total = sum(Decimal(z).exp() for z in logits).ln()
        return [Decimal(z) - total for z in logits]

    beta = Decimal(spec.parameters[0]) if spec.parameters else Decimal("0.5")

    def slope(log_p: Decimal, log_q: Decimal) -> Decimal:
        p, q = log_p.exp(), log_q.exp()
        mixture = beta * p + (1 - beta) * q
        if spec.name == "forward_kl":
            return -p
        if spec.name == "reverse_kl":
            return q * (log_q - log_p)
        if spec.name == "jsd":
            return (1 - beta) * q * (q / mixture).ln()
        if spec.name == "tvd":
            return q.copy_sign(q - p) / 2
        if spec.name == "skew_forward_kl":
            return -p * (1 - beta) * q / mixture
        if spec.name == "skew_reverse_kl":
            return q * (q / mixture).ln() - q * (1 - beta) * q / mixture
        a, b = map(Decimal, spec.parameters)
        return (q ** (a + b) - p**a * q**b) / a

    log_p, log_q = logs(teacher), logs(student)
    slopes = [slope(*pair) for pair in zip(log_p, log_q, strict=True)]
    total = sum(slopes)
    return [s - log.exp() * total for s, log in zip(slopes, log_q, strict=True)]


@cases.each_name
@pytest.mark.parametrize("backend", ("reference", "cpu", "torch"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_against_sixty_digits(spec: Spec, backend: str, dtype: torch.dtype) -> None:
    """The oracle, too: what it is checked with elsewhere loses the same digits."""
    student, teacher = cases.pair((1, 6), scale=1.0)
    student[0, 4] += 25.0
    with decimal.localcontext() as context:
        context.prec = 60
        right = exact_gradient(spec, student[0].tolist(), teacher[0].tolist())
    got = cases.evaluate(
        student.to(dtype), teacher.to(dtype), backend=backend, **spec.arguments
    ).gradient
    allowed = Decimal(2e-6 if dtype == torch.float32 else 1e-7) * max(map(abs, right))
    for of_entry, exact in zip(got[0].tolist(), right, strict=True):
        assert abs(Decimal(of_entry) - exact) <= allowed
