"""The options of the loss: as they are given, and, checked, as every backend gets them."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from . import divergences
from .dispatch import check_name
from .divergences import Divergence
from .problem import REDUCTIONS, Options

_Function = TypeVar("_Function", bound=Callable[..., Any])

GRADIENT_MODES = ("auto", "forward", "recompute")
VOCAB_POLICIES = ("error", "truncate")

#: No scalar argument may exceed this, and what divides must not be below its inverse: float32 holds
#: the square of both, and products with logits of any size that occurs.
_LARGEST = 1e18
DIVISOR = "a number from 1e-18 to 1e18"


class Given(NamedTuple):
    """The options of :func:`kdkernels.fused_kd_loss` by their names there, unchecked.

    Its signature has their defaults. ``num_items`` only if it is a number: tensors are no options.
    """

    temperature: float
    alpha: float | None
    divergence: str | Divergence
    beta: float
    temperature_squared: bool
    reduction: str
    num_items: float | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_softcap: float | tuple[float | None, float | None] | None
    logit_scale: float | tuple[float | None, float | None] | None
    vocab_policy: str
    shift: bool
    gradient: str
    backend: str | None
    return_outputs: bool


class Settings(NamedTuple):
    """The checked options of a call: what is computed, and how the call goes about it."""

    options: Options
    vocab_policy: str
    shift: bool
    gradient: str
    backend: str | None
    return_outputs: bool


def check(given: Given, with_labels: bool) -> Settings:
    """The options, checked; TypeError or ValueError names one that is bad, and its value.

    From a cache, since a training loop passes the same ones at every step.
    """
    if isinstance(given.divergence, Divergence):  # before the cache: such objects may seem equal
        divergences.check_parameters(given.divergence)
    if not torch.compiler.is_compiling():  # Dynamo traces through a cache and warns of it
        try:
            return _cached(with_labels, *given)
        except TypeError:
            pass  # an unhashable option, which the check below names or takes
    return _check(with_labels, *given)


def _check(with_labels: bool, *fields: Any) -> Settings:
    given = Given(*fields)
    _check_choice("vocab_policy", given.vocab_policy, VOCAB_POLICIES)
    options = _options(given, _alpha(given.alpha, with_labels))
    _check_choice("gradient", given.gradient, GRADIENT_MODES)
    if given.label_smoothing and not with_labels:
        raise ValueError(
            f"label_smoothing: {given.label_smoothing!r} was given, but labels is None"
        )
    if given.num_items is not None:
        check_takes_items(given.num_items, options.reduction)
    if given.backend is not None:
        check_name(given.backend)
    return Settings(
        options,
        given.vocab_policy,
        _flag("shift", given.shift),
        given.gradient,
        given.backend,
        _flag("return_outputs", given.return_outputs),
    )


# typed: True and 1 are different options.
_cached = functools.lru_cache(maxsize=512, typed=True)(_check)
divergences.WHEN_NAMED_ANEW.append(_cached.cache_clear)


def _options(given: Given, alpha: float) -> Options:
    """What a backend computes."""
    _check_choice("reduction", given.reduction, REDUCTIONS)
    ignore_index, items = given.ignore_index, given.num_items
    if not isinstance(ignore_index, numbers.Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: {ignore_index!r} is not an int64, as labels are")
    beta = _number("beta", given.beta, "finite", lambda b: True)
    resolved = divergences.resolve(given.divergence, beta)
    scales = _pair("logit_scale", given.logit_scale, 1.0)
    softcaps = _pair("logit_softcap", given.logit_softcap, 0.0)
    return Options(
        temperature=_number("temperature", given.temperature, DIVISOR, divides),
        temperature_squared=_flag("temperature_squared", given.temperature_squared),
        alpha=_number("alpha", alpha, "finite", lambda a: True),
        divergence=resolved.key,
        parameters=resolved.parameters,
        label_smoothing=_number(
            "label_smoothing", given.label_smoothing, "in [0, 1]", lambda e: 0 <= e <= 1
        ),
        z_loss=_number("z_loss", given.z_loss, "a finite number >= 0", lambda z: z >= 0),
        student_scale=_scale(scales[0]),
        teacher_scale=_scale(scales[1]),
        student_softcap=_softcap(softcaps[0]),
        teacher_softcap=_softcap(softcaps[1]),
        ignore_index=int(ignore_index),
        reduction=given.reduction,
        denominator=0.0 if items is None else _number("num_items", items, DIVISOR, divides),
    )


def _check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}: {given!r} is not one of {allowed}")


def check_takes_items(num_items: Any, reduction: str) -> None:
    """ValueError unless the reduction has a denominator."""
    if reduction != "mean":
        raise ValueError(
            f"num_items: {num_items!r} is the denominator of 'mean', not of {reduction!r}"
        )


def with_options_of(function: Any, *left_out: str) -> Any:
    """A decorator for ``f(..., **options)``: its signature shows those of ``function``, too."""

    def shown(decorated: _Function) -> _Function:
        own = inspect.signature(decorated)
        *named, _ = own.parameters.values()
        options = inspect.signature(function).parameters.values()
        known = {*own.parameters, *left_out}
        named += [p for p in options if p.kind is p.KEYWORD_ONLY and p.name not in known]
        vars(decorated)["__signature__"] = own.replace(parameters=named)
        return decorated

    return shown


def check_chunk_bytes(given: Any) -> None:
    """ValueError unless this is None or a number of bytes for the tiles of the linear loss."""
    if given is not None and (type(given) is not int or given <= 0):
        raise ValueError(f"max_chunk_bytes: {given!r} is not an int > 0")


def _alpha(alpha: float | None, with_labels: bool) -> float:
    if alpha is None:
        return 0.5 if with_labels else 1.0
    if not with_labels and alpha != 1:
        raise ValueError(f"alpha: {alpha!r} weighs a cross-entropy, but labels is None")
    return alpha


def _pair(name: str, given: Any, default: float) -> tuple[Any, Any]:
    """(student, teacher), unchecked, from one number, a pair or None."""
    if given is None:
        return default, default
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2:
        raise ValueError(f"{name}: {given!r} is neither a number nor a pair (student, teacher)")
    if any(isinstance(one, bool) for one in pair):
        raise TypeError(f"{name}: expected numbers, got {given!r}")
    if any(one is not None and one == 0 for one in pair):
        raise ValueError(f"{name}: {given!r} contains a 0; None leaves the logits alone")
    student, teacher = (default if one is None else one for one in pair)
    return student, teacher


def _number(name: str, given: Any, allowed: str, ok: Any) -> float:
    if not isinstance(given, numbers.Real) or isinstance(given, bool):
        raise TypeError(f"{name}: expected a number, got {type(given).__name__}")
    number: Any = given
    if not (-math.inf < number < math.inf and ok(number)):  # traceable, unlike math.isfinite
        raise ValueError(f"{name}: {given!r} is not {allowed}")
    if not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"{name}: {given!r} exceeds {_LARGEST:g}; float32 holds its square")
    return float(number)


def divides(number: float) -> bool:
    """Whether the number and its inverse are positive and have squares in float32."""
    return 1 / _LARGEST <= number <= _LARGEST


def _scale(given: Any) -> float:
    allowed = f"{DIVISOR}, nor the negative of one"
    return _number("logit_scale", given, allowed, lambda factor: divides(abs(factor)))


def _softcap(given: Any) -> float:
    return _number("logit_softcap", given, DIVISOR, lambda cap: cap == 0 or divides(cap))


def _flag(name: str, given: Any) -> bool:
    if not isinstance(given, bool):  # "no" and "false" are true
        raise TypeError(f"{name}: {given!r} is neither True nor False")
    return given
