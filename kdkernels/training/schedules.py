"""Numbers that change during training: weights of terms, alpha, temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("constant", "linear", "cosine", "warmup")
_GRAMMAR = "a number, linear:START:END, cosine:START:END or warmup:VALUE:SHARE"


@dataclass(frozen=True)
class Schedule:
    """A number as a function of the progress x of training: 0 at the first update, 1 at the last.

    ========  ====================================================================
    constant  ``end``
    linear    ``start + (end - start) * x``
    cosine    ``end + (start - end) * (1 + cos(pi x)) / 2``
    warmup    ``end * min(1, x / share)``: from 0 within the first ``share`` of it
    ========  ====================================================================
    """

    kind: str
    start: float
    end: float
    share: float = 1.0

    def at(self, progress: float) -> float:
        """The number at ``progress``, which is clamped to [0, 1]."""
        x = min(max(progress, 0.0), 1.0)
        if self.kind == "constant" or x == 1:
            return self.end
        if self.kind == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * x)) / 2
        x = min(1.0, x / self.share)
        return self.end if x == 1 else self.start + (self.end - self.start) * x

    @property
    def highest(self) -> float:
        """Every kind is monotonous: the larger of the end points."""
        return max(self.start, self.end)

    @property
    def lowest(self) -> float:
        return min(self.start, self.end)


def parse(name: str, given: str | float) -> Schedule:
    """``0.5``, ``"linear:0:1"``, ``"cosine:1:0"``, ``"warmup:1:0.1"`` -> a schedule.

    ValueError that starts with ``name`` if ``given`` is none of these or not finite.
    """
    error = ValueError(f"{name}: {given!r} is not {_GRAMMAR}")
    kind, *numbers = str(given).split(":")
    try:
        if not numbers:
            kind, numbers = "constant", [kind, kind]
        first, second = (float(number) for number in numbers)
    except ValueError:
        raise error from None
    if kind not in KINDS or not (math.isfinite(first) and math.isfinite(second)):
        raise error
    if kind != "warmup":
        return Schedule(kind, first, second)
    if not 0 < second <= 1:
        raise ValueError(f"{name}: the share {second} of {given!r} is not in (0, 1]")
    return Schedule(kind, 0.0, first, second)
