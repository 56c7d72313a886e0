"""What is computed: shapes, dtypes, temperatures, and the bytes each has to move."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import divergences, reference
from kdkernels.problem import Options, Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARIES = (30522, 32000, 128256, 151936)
TEMPERATURES = (1.0, 2.0, 3.0)

#: Logits of a workload in the full and in the quick suite, at least. From 2^24 on, a gradient in
#: half precision is larger than 32 MiB, glibc's highest threshold: all of them are fresh pages.
FULL_LOGITS = 1 << 24
QUICK_LOGITS = 1 << 23

#: Largest relative error (loss, 2-norm of the gradient) of a result that still gets a speed. It
#: separates rounding from wrong formulas; the errors themselves are reported. Half precision needs
#: the room: eager rounds every intermediate, and the mean's gradients are subnormal in float16.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}


class Inputs(NamedTuple):
    student: Tensor  #: [rows, vocab]
    teacher: Tensor  #: [rows, vocab]
    labels: Tensor  #: [rows], int64


@dataclass(frozen=True)
class Workload:
    """``alpha T^2 D(teacher, student) + (1 - alpha) CE``, mean over rows, logits given.

    ``allocator`` is ``"default"``, or ``"retain"`` for a process in which glibc keeps freed blocks
    (so that no contender pays for fresh pages).
    """

    name: str
    rows: int
    vocab: int
    dtype: str = "fp32"
    temperature: float = 2.0
    divergence: str = "forward_kl"
    alpha: float = 0.5
    backward: bool = True
    allocator: str = "default"

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def families(self) -> tuple[str, ...] | None:
        """The families of providers that take part; None: all. Divergences: against eager only."""
        return ("fused", "kernel", "eager") if self.group == "divergence" else None

    @property
    def logits(self) -> int:
        return self.rows * self.vocab

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def bytes_moved(self) -> int:
        """The least traffic with memory: student and teacher read once, the gradient written."""
        return (3 if self.backward else 2) * self.itemsize * self.logits

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    def make(self, device: str = "cpu") -> Inputs:
        """Random logits with peaked rows; the student is a noisy copy of the teacher."""
        generator = torch.Generator().manual_seed(2503)
        shape = (self.rows, self.vocab)
        teacher = torch.randn(shape, generator=generator).mul_(3)
        student = torch.randn(shape, generator=generator).mul_(2).add_(teacher, alpha=0.7)
        labels = torch.randint(self.vocab, (self.rows,), generator=generator)
        dtype = DTYPES[self.dtype]
        return Inputs(student.to(device, dtype), teacher.to(device, dtype), labels.to(device))

    def problem(self, inputs: Inputs) -> Problem:
        """The contract's form of this workload, for the oracle and for backends called directly."""
        divergence = divergences.resolve(self.divergence, 0.5)
        options = Options(
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=divergence.name,
            parameters=divergence.parameters,
        )
        return Problem(inputs.student, inputs.teacher, inputs.labels, None, None, options)

    def oracle(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Loss and gradient in float64, from the very inputs that the contenders get."""
        problem = self.problem(inputs)
        loss, _, gradient = reference.forward(problem, want_gradient=self.backward, extras=False)
        return loss, gradient


def _rows(vocab: int, logits: int) -> int:
    """The smallest multiple of 8 rows that holds at least this many logits."""
    return -(-logits // (8 * vocab)) * 8


def _kd_ce(vocab: int, dtype: str, temperature: float, logits: int, **more: str) -> Workload:
    prefix = "retain" if more else "kd_ce"
    name = f"{prefix}/{dtype}/V{vocab}/T{temperature:g}"
    return Workload(name, _rows(vocab, logits), vocab, dtype, temperature, **more)


def suite(quick: bool = False) -> list[Workload]:
    """All workloads, or the few of the quick suite, in the order in which they run."""
    logits = QUICK_LOGITS if quick else FULL_LOGITS
    dtypes = ("fp32", "bf16") if quick else tuple(DTYPES)
    vocabularies = (32000,) if quick else VOCABULARIES
    temperatures = (2.0,) if quick else TEMPERATURES
    names = ("jsd", "tvd") if quick else divergences.names()
    middle = _rows(32000, logits)
    return [
        Workload("call/fp32/8x1000", 8, 1000),
        *([] if quick else [Workload("call_forward/fp32/8x1000", 8, 1000, backward=False)]),
        *(_kd_ce(v, d, t, logits) for v in vocabularies for d in dtypes for t in temperatures),
        *(
            Workload(f"forward/{dtype}/V32000/T2", middle, 32000, dtype, backward=False)
            for dtype in (dtypes[:1] if quick else dtypes)
        ),
        *(Workload(f"divergence/fp32/{n}", middle, 32000, divergence=n) for n in names),
        *(_kd_ce(32000, d, 2.0, logits, allocator="retain") for d in dtypes if not quick),
    ]


def chosen(workloads: Iterable[Workload], patterns: list[str]) -> list[Workload]:
    """Those whose name matches one of the shell patterns; all where there is no pattern.

    A name without a wildcard stands for all names that begin with it, so ``kd_ce/fp32`` works.
    """
    workloads = list(workloads)
    for pattern in patterns:
        if not any(_matches(w.name, pattern) for w in workloads):
            names = ", ".join(w.name for w in workloads)
            raise ValueError(f"--workloads: {pattern!r} matches none of {names}")
    return [w for w in workloads if not patterns or any(_matches(w.name, p) for p in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern if set(pattern) & set("*?[") else pattern + "*")
