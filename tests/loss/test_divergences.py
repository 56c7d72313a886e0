"""The formulas themselves: value and slope entry by entry, limits, registration, the C++ twins."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from kdkernels import Divergence, divergences, fused_kd_loss
from kdkernels.divergences import JSD, AlphaBeta, ForwardKL, SkewForwardKL, SkewReverseKL

INF = math.inf
LOGS = (-INF, -1e4, -800.0, -104.0, -20.0, -5.0, -1.0, -0.1, -1e-3, -1e-9, 0.0)
GRID = torch.tensor(list(itertools.product(LOGS, LOGS)), dtype=torch.float64)
LOG_P, LOG_Q = GRID.T
DEAD = (LOG_P == -INF) & (LOG_Q == -INF)
#: The formula is infinite where it should be: q^-c at q = 0, log(q / p) at p = 0.
FINITE = (LOG_P > -INF) & (LOG_Q > -INF)


@cases.each_spec
def test_value_equals_the_formula_written_out(spec: cases.Spec) -> None:
    """The plain formula cancels (powers / (a b)) and overflows: compared where it holds."""
    log_p, log_q = (
        torch.log_softmax(cases.logits((50, 40), torch.float64, seed=s), -1) for s in (1, 2)
    )
    expected = cases.plain_divergence(spec, log_p, log_q)
    measured = spec.object.value(log_p, log_q).sum(-1)
    torch.testing.assert_close(measured, expected, rtol=1e-11, atol=1e-12)


@cases.each_spec
def test_slope_is_the_derivative_of_value(spec: cases.Spec) -> None:
    keep = FINITE & (LOG_P != LOG_Q)
    if spec.name == "alpha_beta":  # exponents below 0 overflow in the far corner of the grid
        keep &= (LOG_P > -700) & (LOG_Q > -700)
    log_p, log_q = LOG_P[keep], LOG_Q[keep]
    by_autograd = Divergence.slope(spec.object, log_p, log_q)
    torch.testing.assert_close(spec.object.slope(log_p, log_q), by_autograd, rtol=1e-9, atol=1e-13)


@cases.each_spec
def test_entries_that_both_exclude_are_exactly_nothing(spec: cases.Spec) -> None:
    dead = torch.full((3,), -INF, dtype=torch.float64)
    for function in (spec.object.value, spec.object.slope, spec.object.canonical().value):
        assert (function(dead, dead) == 0).all()
    leaf = dead.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(spec.object.value(dead, leaf).sum(), leaf)
    assert (gradient == 0).all()


@cases.each_spec
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_no_entry_of_the_grid_is_nan(spec: cases.Spec, dtype: torch.dtype) -> None:
    log_p, log_q = LOG_P.to(dtype), LOG_Q.to(dtype)
    assert not spec.object.value(log_p, log_q).isnan().any()
    finite = FINITE
    if spec.name == "alpha_beta" and min(spec.parameters) < 0:
        finite = FINITE & (LOG_P > -20) & (LOG_Q > -20)
    assert not spec.object.slope(log_p, log_q)[finite].isnan().any()


@cases.each_spec
def test_equal_entries_cost_exactly_nothing(spec: cases.Spec) -> None:
    for dtype in (torch.float32, torch.float64):
        log = torch.tensor(LOGS, dtype=dtype)
        assert (spec.object.value(log, log) == 0).all()


@cases.each_spec
def test_a_divergence_is_not_negative(spec: cases.Spec) -> None:
    for seed in range(20):
        log_p, log_q = (
            torch.log_softmax(cases.logits((8, 30), torch.float64, seed=seed + 100 * k), -1)
            for k in (1, 2)
        )
        assert (spec.object.value(log_p, log_q).sum(-1) > 0).all()


def test_jensen_shannon_at_a_half_is_symmetric_entry_by_entry() -> None:
    value = JSD(0.5).value
    torch.testing.assert_close(value(LOG_P, LOG_Q), value(LOG_Q, LOG_P), rtol=1e-14, atol=0)


@pytest.mark.parametrize("pair", cases.ALPHA_BETAS, ids=str)
def test_alpha_beta_swaps_its_arguments_with_its_parameters(pair: tuple[float, float]) -> None:
    """D_AB^(a, b)(p, q) = D_AB^(b, a)(q, p): Cichocki et al. 2011, eq. 30."""
    keep = FINITE & (LOG_P > -100) & (LOG_Q > -100)
    log_p, log_q = LOG_P[keep], LOG_Q[keep]
    torch.testing.assert_close(
        AlphaBeta(*pair).value(log_p, log_q),
        AlphaBeta(*pair[::-1]).value(log_q, log_p),
        rtol=1e-12,
        atol=1e-300,
    )


@pytest.mark.parametrize(
    ("limit", "near"),
    [
        ((0.5, 0.0), (0.5, 1e-4)),
        ((0.5, 0.0), (0.5, -1e-4)),
        ((1.0, 0.0), (1.0 - 1e-4, 1e-4)),
        ((0.0, 0.6), (1e-4, 0.6)),
        ((0.0, 1.0), (-1e-4, 1.0)),
        ((0.4, -0.4), (0.4, -0.4 + 1e-6)),
        ((0.4, -0.4), (0.4, -0.4 + 5.6e-17)),
        ((-0.3, 0.3), (-0.3 + 1e-6, 0.3)),
        ((0.0, 0.0), (1e-4, 1e-4)),
        ((0.0, 0.0), (0.0, 1e-4)),
        ((0.0, 0.0), (1e-4, 0.0)),
        ((0.0, 0.0), (1e-4, -1e-4)),
    ],
    ids=str,
)
def test_alpha_beta_reaches_its_limits_continuously(
    limit: tuple[float, float], near: tuple[float, float]
) -> None:
    log_p, log_q = (
        torch.log_softmax(cases.logits((20, 30), torch.float64, seed=s), -1) for s in (1, 2)
    )
    at, close = AlphaBeta(*limit), AlphaBeta(*near)
    for function in ("value", "slope"):
        exact, nearby = (getattr(d, function)(log_p, log_q) for d in (at, close))
        torch.testing.assert_close(nearby, exact, rtol=2e-2, atol=3e-3)


def test_alpha_beta_contains_the_two_kls() -> None:
    log_p, log_q = (
        torch.log_softmax(cases.logits((20, 30), torch.float64, seed=s), -1) for s in (1, 2)
    )
    for pair, name in (((1.0, 0.0), "forward_kl"), ((0.0, 1.0), "reverse_kl")):
        torch.testing.assert_close(
            AlphaBeta(*pair).value(log_p, log_q).sum(-1),
            divergences.resolve(name, 0.5).value(log_p, log_q).sum(-1),
        )


@pytest.mark.parametrize(
    ("end", "near"),
    [
        (JSD(0.0), (JSD(1e-8), 1e-8)),
        (JSD(1.0), (JSD(1 - 1e-8), 1e-8)),
        (SkewForwardKL(0.0), (SkewForwardKL(1e-7), 1.0)),
        (SkewReverseKL(1.0), (SkewReverseKL(1 - 1e-7), 1.0)),
    ],
    ids=lambda d: str(d)[:40],
)
def test_end_points_of_beta_are_the_documented_limits(
    end: Divergence, near: tuple[Divergence, float]
) -> None:
    log_p, log_q = (
        torch.log_softmax(cases.logits((20, 30), torch.float64, seed=s), -1) for s in (1, 2)
    )
    nearby, divisor = near
    torch.testing.assert_close(
        nearby.value(log_p, log_q).sum(-1) / divisor,
        end.value(log_p, log_q).sum(-1),
        rtol=1e-4,
        atol=1e-6,
    )


# --------------------------------------------------------------------- divergences of the user's


@pytest.fixture
def registry() -> Iterator[dict[str, type[Divergence]]]:
    """The registry, restored afterwards."""
    before = dict(divergences._REGISTRY)
    yield divergences._REGISTRY
    divergences._REGISTRY.clear()
    divergences._REGISTRY.update(before)


def hellinger(with_slope: bool) -> type[Divergence]:
    @dataclass(frozen=True)
    class SquaredHellinger(Divergence):
        name = "squared_hellinger"
        weight: float = 1.0

        def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            return self.weight * (torch.exp(log_p / 2) - torch.exp(log_q / 2)) ** 2 / 2

    if not with_slope:
        return SquaredHellinger

    @dataclass(frozen=True)
    class WithSlope(SquaredHellinger):
        name = "squared_hellinger_with_slope"

        def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            root_p, root_q = torch.exp(log_p / 2), torch.exp(log_q / 2)
            return self.weight * (root_q - root_p) * root_q / 2

    return WithSlope


@pytest.mark.parametrize("with_slope", (False, True))
@pytest.mark.parametrize("by_name", (False, True))
@cases.each_mode
def test_a_divergence_of_the_users_own(
    backend: str,
    device: str,
    with_slope: bool,
    by_name: bool,
    gradient: str,
    registry: dict[str, type[Divergence]],
) -> None:
    cls = hellinger(with_slope)
    divergence = cls.name if by_name else cls(weight=2.5)
    weight = 1.0 if by_name else 2.5
    student, teacher = cases.pair((6, 50), device=device)
    options = {"divergence": divergence, "temperature": 2.0, "gradient": gradient}
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=rf"no kernel .*{cls.name}.*it can run on: .*torch"):
            fused_kd_loss(student, teacher, backend=backend, **options)
        return
    measured = cases.evaluate(student, teacher, backend=backend, **options)
    leaf = student.cpu().double().requires_grad_()
    root_p, root_q = (torch.softmax(z / 2, -1).sqrt() for z in (teacher.cpu().double(), leaf))
    expected = weight * 4 * ((root_p - root_q) ** 2).sum(-1).mean() / 2
    expected.backward()
    torch.testing.assert_close(measured.loss.cpu().double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(measured.gradient.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-8)


def test_the_fastest_backend_is_not_tried_with_an_unknown_divergence(
    registry: dict[str, type[Divergence]],
) -> None:
    student, teacher = cases.pair((6, 50))
    loss = fused_kd_loss(student, teacher, divergence=hellinger(False)())
    assert torch.equal(
        loss, fused_kd_loss(student, teacher, divergence="squared_hellinger", backend="torch")
    )


def test_registration_rules(registry: dict[str, type[Divergence]]) -> None:
    with pytest.raises(TypeError, match="must set a class attribute `name`"):
        type("Nameless", (Divergence,), {})
    with pytest.raises(TypeError, match="must set a class attribute `name`"):
        type("Numbered", (Divergence,), {"name": 3})
    for name in cases.BUILT_IN:
        with pytest.raises(ValueError, match=f"name: '{name}' .*built-in"):
            type("Impostor", (Divergence,), {"name": name})
    assert divergences.names()[: len(cases.BUILT_IN)] == cases.BUILT_IN
    first = type("Mine", (Divergence,), {"name": "mine"})
    assert divergences.names()[-1] == "mine"
    second = type("Mine", (Divergence,), {"name": "mine"})  # a notebook's cell run again
    assert divergences.build("mine", ()).__class__ is second is not first
    with pytest.raises(NotImplementedError, match="'mine'"):
        second().value(LOG_P, LOG_Q)


def powered(exponent: float, base: type = Divergence, **fields: Any) -> type[Divergence]:
    """A class whose name all of them have."""
    body = {
        "name": "mine",
        "value": lambda self, log_p, log_q: (log_p.exp() - log_q.exp()).abs() ** exponent,
    }
    return dataclass(frozen=True)(type("Mine", (base,), body | fields))


@pytest.mark.parametrize("relation", ("two packages", "a cell run again", "a subclass"))
@cases.each_mode
def test_divergences_of_one_name_keep_their_formulas(
    gradient: str, relation: str, registry: dict[str, type[Divergence]]
) -> None:
    student, teacher = cases.pair((6, 50))
    base = powered(2.0)
    before = cases.evaluate(student, teacher, divergence=base(), gradient=gradient)
    by_name = cases.evaluate(student, teacher, divergence="mine", gradient=gradient)
    assert torch.equal(before.loss, by_name.loss)
    leaf = student.clone().requires_grad_()
    pending = fused_kd_loss(leaf, teacher, divergence=base(), gradient=gradient)
    if relation == "a subclass":
        later = powered(3.0, base)
    else:
        later = powered(3.0, __module__="another" if relation == "two packages" else __name__)
    pending.backward()
    assert torch.equal(leaf.grad, before.gradient)
    for backend in ("torch", "reference"):
        again = cases.evaluate(student, teacher, divergence=base(), backend=backend)
        torch.testing.assert_close(again.loss, before.loss)
        other = cases.evaluate(student, teacher, divergence=later(), backend=backend)
        log_p, log_q = (torch.log_softmax(z, -1) for z in (teacher, student))
        torch.testing.assert_close(other.loss, later().value(log_p, log_q).sum(-1).mean())
        named = cases.evaluate(student, teacher, divergence="mine", backend=backend)
        assert torch.equal(named.loss, other.loss), "a name is the latest class that has it"
    with pytest.raises(RuntimeError, match=r"no kernel for the divergence 'mine"):
        fused_kd_loss(student, teacher, divergence=later(), backend="cpu")


def test_a_name_that_looks_like_a_key_is_another_class(
    registry: dict[str, type[Divergence]],
) -> None:
    classes = [powered(2.0), powered(3.0)]
    classes.append(powered(4.0, name=classes[1].key))
    classes.append(powered(5.0))
    assert len({cls.key for cls in classes}) == 4
    for cls in classes:
        assert type(divergences.by_key(cls.key, ())) is cls


class _Stateful(Divergence):
    """What is no field of a dataclass does not reach a backend."""

    name = "stateful"

    def __init__(self, weight: float = 1.0) -> None:
        object.__setattr__(self, "weight", weight)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.weight * (log_p.exp() - log_q.exp()) ** 2


class _Needy(_Stateful):
    name = "needy"

    def __init__(self, weight: float) -> None:
        super().__init__(weight)


@dataclass(frozen=True)
class _KeywordOnly(Divergence):
    name = "keyword_only"
    weight: float = field(default=1.0, kw_only=True)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.weight * (log_p.exp() - log_q.exp()) ** 2


@pytest.mark.parametrize(
    ("divergence", "match"),
    (
        (_Stateful(2.0), r"weight of _Stateful is 2\.0, which is no dataclass field"),
        (_Needy(2.0), "_Needy cannot be made anew"),
        (_KeywordOnly(weight=2.0), "_KeywordOnly cannot be made anew"),
    ),
)
@pytest.mark.parametrize("backend", ("torch", "reference", None))
def test_an_object_that_a_backend_would_not_make_again_is_refused(
    divergence: Divergence, match: str, backend: str | None
) -> None:
    student, teacher = cases.pair((6, 50))
    fused_kd_loss(student, teacher, divergence=_Stateful(), backend=backend)  # and is kept
    with pytest.raises(TypeError, match=f"divergence: .*{match}"):
        fused_kd_loss(student, teacher, divergence=divergence, backend=backend)


def test_a_slope_is_zero_where_value_does_not_depend_on_the_student(
    registry: dict[str, type[Divergence]],
) -> None:
    constant = type(
        "Constant", (Divergence,), {"name": "constant", "value": lambda _, p, q: p.exp()}
    )()
    assert (constant.slope(LOG_P, LOG_Q) == 0).all()


# ------------------------------------------------------------------------------ the C++ twins

try:
    native = importlib.import_module("kdkernels._native")
except ImportError:
    native = None
needs_native = pytest.mark.skipif(native is None, reason="the native module was not built")


@needs_native
def test_every_built_in_divergence_has_a_twin() -> None:
    assert set(native.divergence_names()) == set(cases.BUILT_IN)


@needs_native
@cases.each_spec
def test_the_cpp_twin_equals_the_formula_entry_by_entry(spec: cases.Spec) -> None:
    """A native summand may be centred: c (q - p) is added to each value and c q to each slope for
    one constant c, which changes neither the sum nor the gradient of distributions."""
    divergence = spec.object.canonical()
    keep = FINITE & (LOG_P > -600) & (LOG_Q > -600)
    log_p, log_q = LOG_P[keep], LOG_Q[keep]
    pairs = [
        native.divergence(divergence.name, divergence.parameters, p, q)
        for p, q in zip(log_p.tolist(), log_q.tolist(), strict=True)
    ]
    value, slope = torch.tensor(pairs, dtype=torch.float64).T
    expected = divergence.value(log_p, log_q)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)
    unequal = log_p != log_q
    torch.testing.assert_close(
        slope[unequal], divergence.slope(log_p, log_q)[unequal], rtol=1e-9, atol=1e-13
    )


@needs_native
@cases.each_spec
def test_the_cpp_twin_excludes_what_both_exclude(spec: cases.Spec) -> None:
    divergence = spec.object.canonical()
    assert native.divergence(divergence.name, divergence.parameters, -INF, -INF) == (0.0, 0.0)


@needs_native
@cases.each_spec
def test_the_cpp_twin_agrees_where_one_side_excludes(spec: cases.Spec) -> None:
    divergence = spec.object.canonical()
    for log_p, log_q in ((-INF, -1.0), (-1.0, -INF), (-INF, 0.0), (0.0, -INF)):
        value, slope = native.divergence(divergence.name, divergence.parameters, log_p, log_q)
        p, q = (torch.tensor([x], dtype=torch.float64) for x in (log_p, log_q))
        expected = float(divergence.value(p, q))
        assert value == pytest.approx(expected, rel=1e-12), (log_p, log_q)
        expected = float(divergence.slope(p, q))
        assert slope == pytest.approx(expected, rel=1e-12, nan_ok=True), (log_p, log_q)


# ------------------------------------------------- the float that CUDA kernels compute with

#: Of a float32 that is rounded.
ULP = 2.0**-24
_SHARES = (1e-6, 0.1, 0.3, 0.9, 0.999)
_EXPONENTS = ((-0.5, 1.3), (-0.4, 0.4), (-0.5, -0.3), (-1.0, 0.0), (0.0, -1.0), (3.0, 2.0))
#: Every regime of the parameters, more than the tests of whole losses have.
REGIMES = (
    *cases.SPECS,
    *(
        cases.Spec(name, (share,))
        for name in ("jsd", "skew_forward_kl", "skew_reverse_kl")
        for share in _SHARES
    ),
    *(cases.Spec("alpha_beta", exponents) for exponents in _EXPONENTS),
)
_FROM = (-INF, -80.0, -40.0, -20.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.1, -1e-2, -1e-4, 0.0)
_APART = (0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.5, 0.69, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0, 17.0)
#: (log p, log q): both absent, one absent, equal, close, far apart.
PAIRS = (
    *itertools.product(_FROM, _FROM),
    *((log, log - apart) for log in _FROM[1:] for apart in _APART),
    *((log - apart, log) for log in _FROM[1:] for apart in _APART),
)


def float32(numbers: Iterator[float]) -> list[float]:
    return torch.tensor(list(numbers), dtype=torch.float64).float().tolist()


def rounded(spec: cases.Spec, log_p: float, log_q: float, result: float) -> float:
    """What float32's rounding is relative to: the size of the terms before they cancel."""
    p, q = math.exp(log_p), math.exp(log_q)
    apart = 0.0 if log_p == log_q else abs(log_p - log_q)
    larger, near = max(p, q), min(apart, 1.0)
    if spec.name == "alpha_beta":
        inverse = max(1 / abs(x) for x in spec.parameters if x) if any(spec.parameters) else 1.0
        # The exponents of the powers are rounded, too.
        depth = -max(log_p, log_q, -1e3) + (apart if math.isfinite(apart) else 0.0)
        exponents = sum(map(abs, spec.parameters)) * depth
        terms = larger ** sum(spec.parameters) * near * inverse if larger else 0.0
        return (terms + abs(result)) * (1.0 + exponents)
    if spec.name == "tvd":
        return larger + abs(result)
    weights = {"forward_kl": p, "reverse_kl": q}
    of_apart = weights.get(spec.name, min(p, q))
    share = spec.parameters[0] if spec.parameters else 0.5
    logarithm = 1.0 - math.log(min(share, 1.0 - share))
    terms = larger * near * logarithm + (of_apart * apart if of_apart else 0.0)
    return terms + abs(result)


@needs_native
@pytest.mark.parametrize("spec", REGIMES, ids=str)
def test_float_functors_equal_those_of_double(spec: cases.Spec) -> None:
    divergence = spec.object.canonical()
    spec = cases.Spec(divergence.name, divergence.parameters)
    for log_p, log_q in PAIRS:
        measured = native.float32.centred(*spec, log_p, log_q)
        exact = native.centred(*spec, log_p, log_q)
        ties = spec.name == "tvd" and len(set(float32([math.exp(log_p), math.exp(log_q)]))) == 1
        for single, double in zip(measured, (exact[0], 0.0 if ties else exact[1]), strict=True):
            if math.isnan(double):
                assert math.isnan(single), (log_p, log_q)
            elif abs(double) > 3e38:  # float32 ends
                assert math.isinf(single) and single * double > 0, (log_p, log_q)
            else:
                size = rounded(spec, log_p, log_q, double)
                assert abs(single - double) <= 8 * ULP * size + 1e-37, (log_p, log_q)


def relative_error(measured: float, exact: float) -> float:
    return abs(measured - exact) / abs(exact)


@needs_native
def test_float_logarithms_have_every_digit() -> None:
    """At most 2.3 units of rounding; a coefficient's third digit changed gives more."""
    steps = range(4001)
    shares = float32(
        [math.exp(-85 * i / 4000) for i in steps] + [0.5 + i / 8000 for i in steps[:-1]]
    )
    for share in shares[1:]:
        less_one = share - 1.0
        measured = native.float32.log_of_share(share, less_one)
        assert relative_error(measured, math.log(share)) < 2.3 * ULP, share
    less_ones = float32([-i / 4000 for i in steps[1:]] + [-(2.0**-k) for k in range(60)])
    for less_one in less_ones:
        measured = native.float32.log_of_half_share(less_one)
        assert relative_error(measured, math.log1p(less_one / 2)) < 2.3 * ULP, less_one


@needs_native
def test_float_powers_have_every_digit() -> None:
    """At most 1.5 units of rounding for 2^a, and 2.2 for 2^a - 1, which keeps its digits near 0."""
    exponents = float32([i / 32 for i in range(4032)] + [2.0**-k for k in range(60)])
    functions = (
        (native.float32.decay, -1, exponents),
        (native.float32.grow, 1, exponents + [-a for a in exponents]),
    )
    for function, sign, given in functions:
        for a in given:
            power, less_one = function(a)
            assert relative_error(power, 2.0 ** (sign * a)) < 1.5 * ULP, (function, a)
            exact = math.expm1(sign * a * math.log(2))
            assert less_one == exact == 0 or relative_error(less_one, exact) < 2.2 * ULP, a
    assert native.float32.grow(128.0) == native.float32.grow(INF) == (INF, INF)
    for nothing in (native.float32.grow(-INF), *map(native.float32.decay, (127.0, INF, math.nan))):
        assert nothing == (0.0, -1.0)


@needs_native
def test_the_forward_kl_object_is_the_named_one() -> None:
    student, teacher = cases.pair((4, 50))
    assert torch.equal(
        fused_kd_loss(student, teacher, divergence=ForwardKL()), fused_kd_loss(student, teacher)
    )
