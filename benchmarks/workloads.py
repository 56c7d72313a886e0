"""What is computed: shapes, dtypes, temperatures, and the bytes each has to move."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import divergences, reference
from kdkernels.linear import MAX_CHUNK_BYTES
from kdkernels.problem import Options, Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARIES = (30522, 32000, 128256, 151936)
TEMPERATURES = (1.0, 2.0, 3.0)
#: Entries of a sparse teacher's row, and vocabularies.
ENTRIES = 64
TOPK_VOCABULARIES = (32000, 151936)

#: Logits of a workload in the full and in the quick suite, at least. From 2^24 on, a gradient in
#: half precision is larger than 32 MiB, glibc's highest threshold: all of them are fresh pages.
FULL_LOGITS = 1 << 24
QUICK_LOGITS = 1 << 23

#: Hidden size and tokens of the workloads that start from hidden states, and their vocabularies.
HIDDEN = 512
TOKENS = 1024
LINEAR_VOCABULARIES = (32000, 50257, 151936)
#: Tokens of the bfloat16 one: few, since a CPU without native products of bfloat16 does 1 GFLOP/s.
HALF_TOKENS = 64
#: Tokens over which peak memory is measured.
MEMORY_TOKENS: tuple[int, ...] = (1024, 2048, 4096, 16384, 65536)
QUICK_MEMORY_TOKENS: tuple[int, ...] = (1024, 2048)
#: Who takes part where logits are made from hidden states.
LINEAR_PROVIDERS = ("fused_linear", "products", "fused", "eager", "compile", "chunked_linear")
#: Besides them on a GPU.
GPU_LINEAR_PROVIDERS = (
    *("bare_products", "fused_linear_triton"),
    *("liger_linear", "trl_linear", "fla_linear"),
)
ONLY_TIMED = ("products", "compile", "bare_products")
#: On a GPU 2^29 to 2^30 logits take milliseconds: below that, launches are measured, not kernels.
#: (rows, vocab, dtype, temperature); the first four are the ones whose variants are compared.
GPU_SHAPES = (
    (8192, 128256, "bf16", 2.0),
    (8192, 151936, "bf16", 2.0),
    (8192, 50257, "bf16", 2.0),
    (8192, 32000, "bf16", 2.0),
    (4096, 262144, "bf16", 2.0),
    (8192, 128256, "bf16", 1.0),
    (8192, 128256, "bf16", 3.0),
    (4096, 256000, "bf16", 2.0),
    (8192, 131072, "bf16", 2.0),
    (4096, 128256, "fp32", 2.0),
    (4096, 151936, "fp32", 2.0),
    (8192, 50257, "fp32", 1.0),
    (8192, 32000, "fp32", 2.0),
)
GPU_VARIANT_SHAPES = GPU_SHAPES[:4]
#: The same kernels on two formats, and on rows of two alignments: what the table of
#: ``CudaBackend.yields`` could only count.
GPU_MIXED = (
    ((8192, 50257, "bf16", 2.0), {"columns": 50304}),
    ((4096, 128256, "fp32", 2.0), {"teacher_dtype": "bf16"}),
    ((4096, 128256, "bf16", 2.0), {"teacher_dtype": "fp32"}),
)
#: Groups in which backends compete without the call around them.
_KERNELS_ALONE = ("smoke", "variant", "mixed")
GPU_PEER_SHAPES = (GPU_SHAPES[0], GPU_SHAPES[3], (4096, 151936, "bf16", 1.0))
GPU_SMALL_ROWS = {128256: (1, 8, 16, 64, 256, 1024), 151936: (64, 256, 1024), 32000: (64, 1024)}
GPU_SMOKE_VOCABULARIES = (9, 1000, 32000, 50257, 128256, 151936, 262144)
GPU_TOPK_SHAPES = (GPU_SHAPES[3], (4096, 128256, "bf16", 2.0), (4096, 32000, "fp32", 2.0))
GPU_DIVERGENCES = ("reverse_kl", "jsd", "tvd", "skew_forward_kl", "alpha_beta")
#: Tokens, hidden size and vocabulary of the loss from hidden states.
GPU_LINEAR = (4096, 4096, 128256)
#: Given logits of at most this many are checked whole. Of more (only the GPU's workloads: 80 GB of
#: float64 for 8192 x 128256) the gradient is checked on a sample of rows, the loss in slices.
WHOLE_LOGITS = 1 << 26
SAMPLED_ROWS = 64
_SLICE_LOGITS = 1 << 23
#: Logits tensors that eager PyTorch has alive at its peak (measured: 7.0), and the memory that a
#: contender may take with them.
EAGER_TENSORS = 7
MOST_BYTES = 8 << 30

#: Largest relative error (loss, 2-norm of the gradient) of a result that still gets a speed. It
#: separates rounding from wrong formulas; the errors themselves are reported. Half precision needs
#: the room: eager rounds every intermediate, and the mean's gradients are subnormal in float16.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}


class Inputs(NamedTuple):
    """Logits [rows, vocab]; or hidden states [rows, hidden] and weights [vocab, hidden]."""

    student: Tensor
    teacher: Tensor
    labels: Tensor  #: [rows], int64
    student_weight: Tensor | None = None
    teacher_weight: Tensor | None = None
    ids: Tensor | None = None  #: [rows, entries] of the teacher's largest, where they are all of it
    log_probs: Tensor | None = None  #: [rows, entries], at the temperature

    def logits(self) -> tuple[Tensor, Tensor]:
        """Of student and teacher; materialised, if they have to be made."""
        if self.student_weight is None or self.teacher_weight is None:
            return self.student, self.teacher
        student = F.linear(self.student, self.student_weight)
        return student, F.linear(self.teacher, self.teacher_weight)

    def of_rows(self, rows: slice | Tensor) -> Inputs:
        """Some rows of given logits, and what belongs to them."""
        return Inputs(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]

    @property
    def learnt(self) -> tuple[Tensor, ...]:
        """What has gradients, in the order in which answers give them."""
        weight = self.student_weight
        return (self.student,) if weight is None else (self.student, weight)

    def leaves(self, backward: bool) -> Inputs:
        """The same, the student's tensors as leaves of a graph."""
        student, *weight = (t.detach().requires_grad_(backward) for t in self.learnt)
        return self._replace(student=student, student_weight=weight[0] if weight else None)


class Truth(NamedTuple):
    """Loss and gradients of what is learnt; ``rows``: those that the gradients are of, if few."""

    loss: Tensor
    gradients: tuple[Tensor, ...]
    rows: Tensor | None = None


@dataclass(frozen=True)
class Workload:
    """``alpha T^2 D(teacher, student) + (1 - alpha) CE``, mean over rows.

    ``hidden`` is the size of the hidden states that the logits are made from; 0: logits are given.
    ``teacher_dtype`` is the student's if it is empty. ``columns`` is the length of the student's
    rows, of which the vocabulary is the beginning; 0: all. The teacher's rows are packed.
    ``entries`` of a row are what is known of the teacher, with the tail "bucket"; 0: all.
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
    hidden: int = 0
    teacher_dtype: str = ""
    columns: int = 0
    entries: int = 0

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def timed(self) -> bool:
        """False: only memory, or only correctness, is measured."""
        return self.group not in ("linear_memory", "smoke")

    @property
    def subject(self) -> str:
        """The provider that all others are compared with."""
        if self.group == "linear_chunk":
            return chunk_provider(MAX_CHUNK_BYTES)
        if self.group in _KERNELS_ALONE:
            return "kernel"
        if self.entries:
            return "fused_topk"
        return "fused_linear" if self.hidden else "fused"

    def excludes(self, name: str, family: str) -> str | None:
        """Why a provider is not asked to take part, or None. Divergences: against eager only."""
        if self.group == "linear_chunk":
            asked = family == "chunk"
        elif self.entries:
            asked = family == "topk"
        elif self.hidden:
            asked = name in LINEAR_PROVIDERS + GPU_LINEAR_PROVIDERS
            asked = asked and (self.timed or name not in ONLY_TIMED)
        elif self.group == "divergence":
            asked = family in ("fused", "kernel", "eager")
        elif self.group in _KERNELS_ALONE:
            asked = family in ("kernel", "variant") and name != "kernel_forward_kl"
        elif self.group == "small":
            asked = family in ("fused", "kernel", "graph", "eager", "compile")
        else:
            asked = family not in ("linear", "chunk", "products", "variant", "graph", "topk")
        return None if asked else f"not in {self.group}"

    @property
    def logits(self) -> int:
        return self.rows * self.vocab

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def of_teacher(self) -> torch.dtype:
        return DTYPES[self.teacher_dtype or self.dtype]

    @property
    def bytes_moved(self) -> int:
        """The least traffic with memory: student and teacher read once, the gradient written."""
        if self.entries:
            passes = 2 if self.backward else 1
            return passes * self.itemsize * self.logits + 16 * self.rows * self.entries
        bytes_each = (2 if self.backward else 1) * self.itemsize + self.of_teacher.itemsize
        return bytes_each * (self.learnt_elements or self.logits)

    @property
    def learnt_elements(self) -> int:
        """Elements of a model's hidden states and weight; 0 where logits are given."""
        return self.hidden * (self.rows + self.vocab)

    @property
    def flops(self) -> int:
        """Of the matrix products: two for the logits, two for the gradients."""
        return 2 * (4 if self.backward else 2) * self.logits * self.hidden

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    def make(self, device: str = "cpu") -> Inputs:
        """Random logits with peaked rows; the student is a noisy copy of the teacher."""
        generator = torch.Generator(device).manual_seed(2503)
        dtype = DTYPES[self.dtype]

        def pair(*shape: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
            teacher = torch.randn(shape, generator=generator, device=device).mul_(3 * size)
            student = torch.randn(shape, generator=generator, device=device).mul_(2 * size)
            student.add_(teacher, alpha=0.7)
            return student.to(dtype), teacher.to(self.of_teacher)

        def choose_labels() -> Tensor:
            return torch.randint(self.vocab, (self.rows,), generator=generator, device=device)

        if not self.hidden:
            student, teacher = pair(self.rows, self.vocab)
            if self.columns:
                student = F.pad(student, (0, self.columns - self.vocab))[:, : self.vocab]
            labels = choose_labels()
            if not self.entries:
                return Inputs(student, teacher, labels)
            log_p = F.log_softmax(teacher.float() / self.temperature, -1)
            log_probs, ids = log_p.topk(self.entries)
            return Inputs(student, teacher, labels, ids=ids, log_probs=log_probs)
        labels = choose_labels()
        # The same hidden states for both, so that the logits are as above.
        shape = (self.rows, self.hidden)
        states = torch.randn(shape, generator=generator, device=device).to(dtype)
        weights = pair(self.vocab, self.hidden, size=self.hidden**-0.5)
        return Inputs(states, states, labels, *weights)

    def problem(self, inputs: Inputs, denominator: float = 0.0) -> Problem:
        """The contract's form of this workload, for the oracle and for backends called directly."""
        divergence = divergences.resolve(self.divergence, 0.5)
        options = Options(
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=divergence.name,
            parameters=divergence.parameters,
            denominator=denominator,
            tail="bucket" if self.entries else "",
        )
        if not self.entries:
            return Problem(*inputs.logits(), inputs.labels, None, None, options)
        assert inputs.log_probs is not None
        wide = inputs.log_probs.double()
        return Problem(inputs.student, wide, inputs.labels, None, None, options, inputs.ids)

    def oracle(self, inputs: Inputs) -> Truth:
        """Loss and gradients in float64, from the very inputs that the contenders get."""
        if self.hidden:
            return self._oracle_of_hidden(inputs)
        if self.logits > WHOLE_LOGITS:
            return self._oracle_of_sample(inputs)
        problem = self.problem(inputs)
        loss, _, gradient = reference.forward(problem, want_gradient=self.backward, extras=False)
        return Truth(loss, () if gradient is None else (gradient,))

    def _oracle_of_sample(self, inputs: Inputs) -> Truth:
        """The whole loss, slice by slice, and the gradients of a few rows spread over all."""
        device = inputs.student.device
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for rows in torch.arange(self.rows).split(max(1, _SLICE_LOGITS // self.vocab)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            problem = self.problem(inputs.of_rows(part), self.rows)
            loss += reference.forward(problem, want_gradient=False, extras=False)[0]
        if not self.backward:
            return Truth(loss, ())
        # Both ends, where rows are handed out first and last, and anything between.
        generator = torch.Generator().manual_seed(2503)
        between = torch.randint(self.rows, (SAMPLED_ROWS,), generator=generator)
        sample = torch.cat([torch.tensor([0, self.rows - 1]), between]).unique().to(device)
        gradients = []
        for rows in sample.split(max(1, _SLICE_LOGITS // self.vocab)):
            problem = self.problem(inputs.of_rows(rows), self.rows)
            gradients.append(reference.forward(problem, want_gradient=True, extras=False)[2])
        return Truth(loss, (torch.cat(gradients),), sample)

    def _oracle_of_hidden(self, inputs: Inputs) -> Truth:
        """In slices of rows: of whole logits in float64 a dozen tensors would be alive."""
        labels = inputs.labels
        wide = Inputs(*(t if t is labels else t.double() for t in inputs if t is not None))
        assert wide.student_weight is not None
        loss = torch.zeros((), dtype=torch.float64, device=labels.device)
        to_weight, to_hidden = torch.zeros_like(wide.student_weight), []
        for rows in torch.arange(self.rows).split(64):
            part = wide._replace(
                student=wide.student[rows], teacher=wide.teacher[rows], labels=labels[rows]
            )
            problem = self.problem(part, denominator=self.rows)
            value, _, gradient = reference.forward(
                problem, want_gradient=self.backward, extras=False
            )
            loss += value
            if gradient is not None:
                to_hidden.append(gradient @ wide.student_weight)
                to_weight.addmm_(gradient.t(), part.student)
        return Truth(loss, (torch.cat(to_hidden), to_weight) if self.backward else ())


def chunk_provider(max_chunk_bytes: int) -> str:
    """The name of the provider that has tiles of this size."""
    return f"chunk_{max_chunk_bytes >> 20}M"


def _rows(vocab: int, logits: int) -> int:
    """The smallest multiple of 8 rows that holds at least this many logits."""
    return -(-logits // (8 * vocab)) * 8


def _kd_ce(vocab: int, dtype: str, temperature: float, logits: int, **more: str) -> Workload:
    prefix = "retain" if more else "kd_ce"
    name = f"{prefix}/{dtype}/V{vocab}/T{temperature:g}"
    return Workload(name, _rows(vocab, logits), vocab, dtype, temperature, **more)


def _linear(kind: str, rows: int, vocab: int, dtype: str = "fp32", tail: str = "") -> Workload:
    return Workload(f"{kind}/{dtype}/V{vocab}{tail}", rows, vocab, dtype, hidden=HIDDEN)


def _linear_suite(quick: bool) -> list[Workload]:
    """From hidden states to the loss: time, the tiles' size, and memory over tokens."""
    if quick:
        timed = [_linear("linear", _rows(32000, QUICK_LOGITS), 32000)]
        tokens, vocab = QUICK_MEMORY_TOKENS, 32000
    else:
        timed = [
            *(_linear("linear", TOKENS, vocab) for vocab in LINEAR_VOCABULARIES),
            _linear("linear", HALF_TOKENS, 50257, "bf16"),
            *(_linear("linear_chunk", TOKENS, vocab) for vocab in LINEAR_VOCABULARIES[1:]),
        ]
        tokens, vocab = MEMORY_TOKENS, 50257
    return timed + [_linear("linear_memory", n, vocab, tail=f"/N{n}") for n in tokens]


def suite(quick: bool = False, device: str = "cpu") -> list[Workload]:
    """All workloads, or the few of the quick suite, in the order in which they run."""
    if device == "cuda":
        shapes = GPU_VARIANT_SHAPES
        return [_of_shape("kd_ce", *shape) for shape in shapes] if quick else gpu_suite()
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
        *(
            Workload(f"topk/{d}/V{v}/K{ENTRIES}", _rows(v, logits), v, d, entries=ENTRIES)
            for v in TOPK_VOCABULARIES[: 1 if quick else None]
            for d in dtypes[:2]
        ),
        *(_kd_ce(32000, d, 2.0, logits, allocator="retain") for d in dtypes if not quick),
        *_linear_suite(quick),
    ]


def _of_shape(
    kind: str, rows: int, vocab: int, dtype: str, temperature: float, **more: Any
) -> Workload:
    name = f"{kind}/{dtype}/{rows}x{vocab}/T{temperature:g}"
    name += "".join(f"/{option}={value}" for option, value in more.items() if option != "hidden")
    return Workload(name, rows, vocab, dtype, temperature, **more)


def gpu_suite() -> list[Workload]:
    """The workloads of a GPU, in the order in which they run; their groups are gpu-day's steps."""
    tokens, hidden, vocab = GPU_LINEAR
    middle = (4096, 128256, "bf16", 2.0)
    return [
        # Rows of every alignment, and more of them than clusters.
        *(
            _of_shape("smoke", rows, vocab, dtype, temperature)
            for vocab in GPU_SMOKE_VOCABULARIES
            for rows, dtype, temperature in (
                (5, "bf16", 2.0),
                (5, "bf16", 3.0),
                (40 if vocab < 1 << 15 else 18, "fp32", 1.0),
            )
        ),
        *(_of_shape("kd_ce", *shape) for shape in GPU_SHAPES),
        *(_of_shape("variant", *shape) for shape in GPU_VARIANT_SHAPES),
        *(_of_shape("mixed", *shape, **options) for shape, options in GPU_MIXED),
        *(
            _of_shape("small", rows, vocab, "bf16", 2.0)
            for vocab, all_rows in GPU_SMALL_ROWS.items()
            for rows in all_rows
        ),
        *(_of_shape("peer", *shape) for shape in GPU_PEER_SHAPES),
        *(
            _of_shape(kind, tokens, vocab, "bf16", 2.0, hidden=hidden)
            for kind in ("linear", "linear_chunk")
        ),
        *(_of_shape("topk", *shape, entries=ENTRIES) for shape in GPU_TOPK_SHAPES),
        *(
            replace(_of_shape("divergence", *middle), name=f"divergence/bf16/{n}", divergence=n)
            for n in GPU_DIVERGENCES
        ),
    ]


def tiny(workload: Workload) -> Workload:
    """The same on a few hundred rows' worth less, for a rehearsal on a CPU; its name stays."""
    few = max(2, workload.rows // 512)
    vocab = min(workload.vocab, max(9, workload.vocab // 64))
    return replace(
        workload,
        rows=min(workload.rows, few if workload.group != "smoke" else 5),
        vocab=vocab,
        hidden=workload.hidden // 64,
        columns=workload.columns and vocab + workload.columns - workload.vocab,
    )


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
