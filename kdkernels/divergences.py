"""The divergences: every formula the project has, written once, for tensors of log-probabilities.

A :class:`Divergence` is a function of one vocabulary entry. With p the teacher's and q the
student's probability of that entry it has

* ``value(log_p, log_q)``: the entry's contribution, so that ``D(p, q) = sum_v value_v``;
* ``slope(log_p, log_q)``: the partial derivative of ``value`` with respect to ``log_q``.

Softmax's Jacobian is then the same for all of them: with q = softmax(z / T),
``dD/dz_v = (slope_v - q_v * sum(slope)) / T``. ``csrc/divergences.h`` is the C++ twin of this file;
the tests compare the two entry by entry.

An entry that both distributions exclude (both log-probabilities -inf) contributes exactly 0, and
0 * log 0 is 0 everywhere. Mixtures are formed in log space, so entries whose probabilities
underflow contribute 0 and not NaN.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import torch_private

#: The latest class of each name, and every class by its key.
_REGISTRY: dict[str, type[Divergence]] = {}
_CLASSES: dict[str, type[Divergence]] = {}
#: Called when a name comes to mean another class, by those who remember what it meant.
WHEN_NAMED_ANEW: list[Callable[[], None]] = []


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Autograd, also inside an op that torch runs below autograd (a compiled graph, opcheck).

    There enabling gradients alone records nothing, and every gradient would be 0.
    """
    with torch_private.autograd_included(), torch.enable_grad():
        yield


@dataclass(frozen=True)
class Divergence:
    """Base class. Subclass it, set ``name`` and write ``value`` to use a divergence of your own::

        @dataclass(frozen=True)
        class SquaredHellinger(Divergence):
            name = "squared_hellinger"

            def value(self, log_p, log_q):
                return (torch.exp(log_p / 2) - torch.exp(log_q / 2)) ** 2 / 2

        fused_kd_loss(student_logits, teacher_logits, divergence=SquaredHellinger())

    It runs on the backends that evaluate Python (``torch``, ``reference``); the native ones refuse
    it by name. ``slope`` is derived from ``value`` by autograd unless you write it, too. Parameters
    are dataclass fields and must be floats: a backend makes the object anew from its class and
    them. A second class of the same name (a cell of a notebook that runs again) takes over the
    name; objects of the first keep their formula.
    """

    name: ClassVar[str] = ""
    #: What a backend finds the class by: its name, and a number behind it if another class has it.
    key: ClassVar[str] = ""
    #: True: rounding residue below 0 in a row's sum is returned as 0.
    nonnegative: ClassVar[bool] = False
    #: True: ``fused_kd_loss(divergence=name, beta=...)`` hands its beta to this class.
    takes_beta: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name or not isinstance(cls.name, str):
            raise TypeError(f"{cls.__qualname__} must set a class attribute `name` (a string)")
        known = _REGISTRY.get(cls.name)
        if known is not None and known.__module__ == __name__ and cls.__module__ != __name__:
            raise ValueError(f"name: {cls.name!r} is the name of a built-in divergence")
        _REGISTRY[cls.name] = cls
        later = (f"{cls.name}#{n}" for n in itertools.count(2))
        cls.key = next(k for k in itertools.chain([cls.name], later) if k not in _CLASSES)
        _CLASSES[cls.key] = cls
        if cls.key != cls.name:
            for forget in WHEN_NAMED_ANEW:
                forget()

    @property
    def parameters(self) -> tuple[float, ...]:
        """The dataclass fields in order: together with ``key`` all that a backend receives."""
        return tuple(float(getattr(self, field.name)) for field in dataclasses.fields(self))

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The contribution of each entry to the divergence; any shape, elementwise."""
        raise NotImplementedError(f"divergence {self.name!r} does not define value(log_p, log_q)")

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """d value / d log_q, elementwise; by default autograd of :meth:`value`."""
        with differentiable():
            leaf = log_q.detach().requires_grad_()
            value = self.value(log_p.detach(), leaf)
            if not value.requires_grad:
                return torch.zeros_like(log_q)
            return torch.autograd.grad(value.sum(), leaf)[0]

    def canonical(self) -> Divergence:
        """The simplest divergence equal to this one (an end point may be a plain KL)."""
        return self


def _is_dead(log_p: Tensor, log_q: Tensor) -> Tensor:
    """True where both log-probabilities are -inf: such an entry is not part of the distribution."""
    return (log_p == -math.inf) & (log_q == -math.inf)


def _weighted_log_ratio(weight: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """weight * (log_a - log_b) with 0 * anything = 0, in the value and in autograd's gradient."""
    none = weight == 0
    ratio = log_a.masked_fill(none, 0.0) - log_b.masked_fill(none, 0.0)
    return (weight * ratio).masked_fill(none, 0.0)


def _weighted(weight: Tensor, factor: Tensor) -> Tensor:
    """weight * factor with 0 * anything = 0, in the value and in autograd's gradient."""
    return (weight * factor.masked_fill(weight == 0, 0.0)).masked_fill(weight == 0, 0.0)


def _power(log: Tensor, exponent: float) -> Tensor:
    """exp(log) ** exponent with x ** 0 = 1, for x = 0 as well."""
    return torch.exp(exponent * log) if exponent else torch.ones_like(log)


def _logs_over_mixture(beta: float, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(log(p / m), log(q / m)) for m = beta * p + (1 - beta) * q and 0 < beta < 1; 0 where both
    are -inf.

    From log(q / p) and not from log m, which would round away what is left where p and q are close:
    both are exactly 0 where p = q.
    """
    dead = _is_dead(log_p, log_q)
    gap = log_q.masked_fill(dead, 0.0) - log_p.masked_fill(dead, 0.0)
    p_is_larger = gap <= 0
    # m = larger * (1 + weight of the smaller * (smaller / larger - 1)).
    p_over_m = -torch.log1p((1 - beta) * torch.expm1(gap.clamp(max=0)))
    q_over_m = -torch.log1p(beta * torch.expm1((-gap).clamp(max=0)))
    return (
        torch.where(p_is_larger, p_over_m, q_over_m - gap),
        torch.where(p_is_larger, gap + p_over_m, q_over_m),
    )


def _check_beta(name: str, beta: float, low_open: bool, high_open: bool) -> None:
    inside = (beta > 0 if low_open else beta >= 0) and (beta < 1 if high_open else beta <= 1)
    if not inside:
        interval = f"{'(' if low_open else '['}0, 1{')' if high_open else ']'}"
        raise ValueError(f"beta: {beta!r} is outside {interval}, the range of {name!r}")


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum p (log p - log q). Hinton et al. 2015, arXiv:1503.02531."""

    name = "forward_kl"
    nonnegative = True

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _weighted_log_ratio(log_p.exp(), log_p, log_q)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -log_p.exp()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p). Gu et al. 2024 (MiniLLM), arXiv:2306.08543.

    +inf for a row in which the student gives mass to an entry that the teacher excludes (-inf).
    """

    name = "reverse_kl"
    nonnegative = True

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _weighted_log_ratio(log_q.exp(), log_q, log_p)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        q = log_q.exp()
        return _weighted_log_ratio(q, log_q, log_p) + q


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta)
    q.

    Agarwal et al. 2024 (GKD), arXiv:2306.13649. ``beta`` in [0, 1] weighs the teacher. As in GKD
    and TRL the end points stand for the limits of JSD / beta and JSD / (1 - beta): beta = 0 is
    forward KL, beta = 1 is reverse KL.
    """

    name = "jsd"
    nonnegative = True
    takes_beta = True
    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_beta(self.name, self.beta, low_open=False, high_open=False)

    def canonical(self) -> Divergence:
        return ForwardKL() if self.beta == 0 else ReverseKL() if self.beta == 1 else self

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta in (0, 1):
            return self.canonical().value(log_p, log_q)
        p_over_m, q_over_m = _logs_over_mixture(self.beta, log_p, log_q)
        return self.beta * _weighted(log_p.exp(), p_over_m) + (1 - self.beta) * _weighted(
            log_q.exp(), q_over_m
        )

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta in (0, 1):
            return self.canonical().slope(log_p, log_q)
        _, q_over_m = _logs_over_mixture(self.beta, log_p, log_q)
        return (1 - self.beta) * _weighted(log_q.exp(), q_over_m)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Total variation distance: sum |p - q| / 2. Wen et al. 2023 (f-DISTILL), arXiv:2307.15190.

    The subgradient at p = q is 0.
    """

    name = "tvd"
    nonnegative = True

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs() / 2

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        q = log_q.exp()
        return q * torch.sign(q - log_p.exp()) / 2


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p || m) with m = beta p + (1 - beta) q. Ko et al. 2024 (DistiLLM), arXiv:2402.03898.

    ``beta`` in [0, 1) weighs the teacher in the mixture: DistiLLM's skew alpha = 0.1 is beta = 0.1;
    beta = 0 is forward KL.
    """

    name = "skew_forward_kl"
    nonnegative = True
    takes_beta = True
    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_beta(self.name, self.beta, low_open=False, high_open=True)

    def canonical(self) -> Divergence:
        return ForwardKL() if self.beta == 0 else self

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta == 0:
            return self.canonical().value(log_p, log_q)
        p_over_m, _ = _logs_over_mixture(self.beta, log_p, log_q)
        return _weighted(log_p.exp(), p_over_m)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta == 0:
            return self.canonical().slope(log_p, log_q)
        _, q_over_m = _logs_over_mixture(self.beta, log_p, log_q)
        return -log_p.exp() * (1 - self.beta) * torch.exp(q_over_m)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || m) with m = beta p + (1 - beta) q. Ko et al. 2024 (DistiLLM), arXiv:2402.03898.

    ``beta`` in (0, 1] weighs the teacher in the mixture: DistiLLM's skew alpha = 0.1 is beta = 0.9;
    beta = 1 is reverse KL.
    """

    name = "skew_reverse_kl"
    nonnegative = True
    takes_beta = True
    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_beta(self.name, self.beta, low_open=True, high_open=False)

    def canonical(self) -> Divergence:
        return ReverseKL() if self.beta == 1 else self

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta == 1:
            return self.canonical().value(log_p, log_q)
        _, q_over_m = _logs_over_mixture(self.beta, log_p, log_q)
        return _weighted(log_q.exp(), q_over_m)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta == 1:
            return self.canonical().slope(log_p, log_q)
        p_over_m, q_over_m = _logs_over_mixture(self.beta, log_p, log_q)
        q = log_q.exp()
        # q (1 - share) with share = (1 - beta) q / m the student's part of the mixture; 1 - share
        # is the teacher's part, formed without cancellation.
        return _weighted(q, q_over_m) + q * (self.beta * torch.exp(p_over_m))


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """The alpha-beta divergence, used for distillation by Wang et al. 2025 (ABKD),
    arXiv:2505.04560.

    ``-1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]`` with its limits (Cichocki et al.
    2011, Entropy 13(1)):

    * b = 0:      ``1/a^2 sum [p^a log(p^a / q^a) - p^a + q^a]``
    * a = 0:      ``1/b^2 sum [q^b log(q^b / p^b) - q^b + p^b]``
    * a + b = 0:  ``1/a^2 sum [log(q^a / p^a) + (q^a / p^a)^-1 - 1]``
    * a = b = 0:  ``1/2 sum (log p - log q)^2``

    Exponents are 0 or of magnitude 1e-4 to 100: nearer to 0, float32 loses what the limits keep.
    (a, b) = (1, 0) is forward KL, (0, 1) reverse KL. Fields are the paper's alpha and beta; they
    have nothing to do with ``fused_kd_loss``'s ``alpha`` and ``beta``.
    """

    name = "alpha_beta"
    nonnegative = True
    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        for field, given in (("alpha", self.alpha), ("beta", self.beta)):
            if not math.isfinite(given):
                raise ValueError(f"{field}: {given!r} is not finite ({self.name!r})")
            if given != 0 and not 1e-4 <= abs(given) <= 100:
                raise ValueError(
                    f"{field}: {given!r} is neither 0 nor of magnitude 1e-4 to 100, where float32 "
                    f"can tell powers from 1, 0 and infinity ({self.name!r})"
                )

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        dead = _is_dead(log_p, log_q)
        log_p, log_q = log_p.masked_fill(dead, 0.0), log_q.masked_fill(dead, 0.0)
        # Every case is base^(a+b) times a function of the log-ratio that is exactly 0 at ratio 1;
        # the larger of p and q is the base, so that the ratio's powers do not overflow.
        below = (log_q - log_p).clamp(max=0.0)
        above = (log_p - log_q).clamp(max=0.0)
        total = self.alpha + self.beta
        from_p = _weighted(_power(log_p, total), self._shape(self.alpha, self.beta, below))
        from_q = _weighted(_power(log_q, total), self._shape(self.beta, self.alpha, above))
        value = torch.where(log_p >= log_q, from_p, from_q)
        # No entry is negative: inf - inf, which exponents of opposite sign can give, is +inf.
        unknown = value.isnan() & ~(log_p.isnan() | log_q.isnan())
        return value.masked_fill(unknown, math.inf).masked_fill(dead, 0.0)

    @staticmethod
    def _shape(own: float, other: float, ratio: Tensor) -> Tensor:
        """The entry's value over base^(own + other); ratio = log(other one / base) <= 0."""
        total = own + other
        if own == 0 and other == 0:
            return ratio**2 / 2
        if own == 0:
            power = other * ratio
            finite = power.masked_fill(power == -math.inf, 0.0)  # there x e^x is 0, too
            return (finite * torch.exp(finite) - torch.expm1(power)) / other**2
        if other == 0:
            return (torch.expm1(own * ratio) - own * ratio) / own**2
        if total == 0:
            return (torch.expm1(other * ratio) - other * ratio) / own**2
        mixed = torch.expm1(other * ratio) - other / total * torch.expm1(total * ratio)
        return -mixed / (own * other)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        dead = _is_dead(log_p, log_q)
        log_p, log_q = log_p.masked_fill(dead, 0.0), log_q.masked_fill(dead, 0.0)
        ratio = log_p - log_q
        power = _power(log_q, self.alpha + self.beta)
        if not self.alpha:
            return -_weighted(power, ratio)
        # -q^(a+b) (e^(a ratio) - 1) / a, and where its factors are 0 and inf the two powers, whose
        # difference does not cancel there.
        slope = -power * torch.expm1(self.alpha * ratio) / self.alpha
        crossed = torch.exp(self.alpha * log_p + (self.beta * log_q if self.beta else 0.0))
        direct = (power - crossed) / self.alpha
        use_direct = (ratio.abs() * abs(self.alpha) > 1) & ~direct.isnan()
        return torch.where(use_direct, direct, slope).masked_fill(dead, 0.0)


def names() -> tuple[str, ...]:
    """Names of all divergences, the built-in ones first."""
    return tuple(_REGISTRY)


def build(name: str, parameters: Sequence[float]) -> Divergence:
    """The divergence that has this ``name`` and these ``parameters``."""
    return _REGISTRY[name](*parameters)


def by_key(key: str, parameters: Sequence[float]) -> Divergence:
    """The divergence whose class has this ``key``, with these ``parameters``."""
    return _CLASSES[key](*parameters)


def check_parameters(divergence: Divergence) -> None:
    """TypeError unless the class makes the same object of its parameters, as backends do."""
    cls = type(divergence)
    if cls.__module__ == __name__:
        return
    try:
        again = vars(by_key(cls.key, divergence.parameters))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"divergence: {cls.__qualname__} cannot be made anew from its dataclass fields, which "
            f"must be floats, in the order of its arguments ({error})"
        ) from error
    for name, value in vars(divergence).items():
        if name in again and again[name] != value:
            raise TypeError(
                f"divergence: {name} of {cls.__qualname__} is {value!r}, which is no dataclass "
                "field: a backend, which makes the object anew from its fields, would not have it"
            )


def resolve(divergence: str | Divergence, beta: float) -> Divergence:
    """``fused_kd_loss``'s ``divergence`` and ``beta`` arguments as a canonical :class:`Divergence`.

    ``beta`` is read only for a name whose class takes it; 0.5 is the neutral default, any other
    value that would go unread is refused.
    """
    if isinstance(divergence, Divergence):
        if beta != 0.5:
            raise ValueError(
                f"beta: {beta!r} was given next to a Divergence object; set it on the object"
            )
        return divergence.canonical()
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence: {divergence!r} is neither a name nor a kdkernels.divergences.Divergence"
        )
    if divergence not in _REGISTRY:
        raise ValueError(f"divergence: {divergence!r} is not one of {', '.join(names())}")
    cls = _REGISTRY[divergence]
    if cls.takes_beta:
        return cls(beta=beta).canonical()  # type: ignore[call-arg]
    if beta != 0.5:
        hint = "; pass AlphaBeta(alpha, beta) instead" if cls is AlphaBeta else ""
        raise ValueError(f"beta: {beta!r} was given, but {divergence!r} has no beta{hint}")
    return cls()
