"""One program's way over the columns of a row: its slice, the tiles, what is read of them.

A tile is [K, THREADS, W]: W neighbouring columns are the 16 bytes that a thread loads, and both
reductions of a tile, over W and K, stay in the thread. So the loops hold no barrier and no shuffle;
threads are combined once per row.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .functors import tanh


class Each(NamedTuple):
    """One thing for each of the three [rows, columns] tensors: pointers, offsets."""

    student: Any
    teacher: Any
    gradient: Any


class Logits(NamedTuple):
    """How one model's columns are read; its Variant fields are the ``SIDE`` beside it."""

    stride: Any
    scale: Any
    softcap: Any


class Slice(NamedTuple):
    """The columns of a row that one of its members does, in vectors of W.

    Columns before the first 16-byte boundary (``head``) and behind the last whole vector are the
    ``edges``; member 0 does them. The vectors in between are shared out; their accesses are 16
    bytes wide, whatever the vocabulary.
    """

    member: Any
    head: Any
    vectors: Any  # of the whole row
    first: Any
    last: Any
    edges: Any


class Place(NamedTuple):
    """A row in memory, and what this program does of it."""

    row: Any  # 64 bits: every offset of a row is computed from it
    bases: Each  # of the tensors
    starts: Each  # the row's offsets in them
    rows: Each  # bases + starts
    student: Logits
    teacher: Logits
    part: Slice


@triton.jit
def column(base, columns, stride, UNIT: tl.constexpr):
    """Pointers to columns of a row."""
    if UNIT:
        return base + columns
    else:
        return base + columns.to(tl.int64) * stride


@triton.jit
def transformed(z, logits, SIDE: tl.constexpr, P: tl.constexpr):
    """Scaled and capped logits."""
    z = z.to(tl.float32)
    if SIDE.scale:
        z = z * logits.scale
    if SIDE.softcap:
        z = logits.softcap * tanh(z * (1 / logits.softcap), P.functor)
    return z


@triton.jit
def _read(base, columns, mask, logits, SIDE: tl.constexpr, POLICY: tl.constexpr, P: tl.constexpr):
    """A tile of transformed logits; -inf where masked."""
    pointers = column(base, columns, logits.stride, SIDE.unit)
    if mask is None:
        z = tl.load(pointers, eviction_policy=POLICY)
        return transformed(z, logits, SIDE, P)
    else:
        z = tl.load(pointers, mask=mask, other=-float("inf"), eviction_policy=POLICY)
        z = transformed(z, logits, SIDE, P)
        if SIDE.scale or SIDE.softcap:
            z = tl.where(mask, z, -float("inf"))
        return z


@triton.jit
def by_thread(x, P: tl.constexpr):
    """A tile as it is loaded, [K * THREADS, W], in the shape of a body's reductions.

    Only the two-dimensional one leaves the compiler no choice: of [K, THREADS, W], whose first two
    axes are equally far from neighbours, Triton before 3.7 lays the first one across lanes, and
    reductions over it are shuffles.
    """
    return tl.reshape(x, [x.shape[0] // P.tile.THREADS, P.tile.THREADS, x.shape[1]])


@triton.jit
def _tile(
    BODY: tl.constexpr, READS: tl.constexpr, POLICY: tl.constexpr,
    state, place, pointers, first, columns, mask, given, P: tl.constexpr,
):  # fmt: skip
    """Load a tile, transform it, hand it to BODY. ``columns`` count from column ``first``."""
    z, t = None, None
    if READS > 0:
        z = _read(pointers.student, columns, mask, place.student, P.student, POLICY, P)
    if READS == 2:
        t = _read(pointers.teacher, columns, mask, place.teacher, P.teacher, POLICY, P)
    if READS > 0:
        z = by_thread(z, P)
    if READS == 2:
        t = by_thread(t, P)
    return BODY(state, z, t, first + columns, mask, pointers.gradient + columns, given, P)


@triton.jit
def _main(base, start, head, P: tl.constexpr):
    """Where a row's whole vectors begin.

    Hints have to stand beside the additions whose attributes they are: one on the offset, which
    AMD's compiler keeps, and one on the pointer, which holds for a base of any alignment.
    """
    at = start + head
    if P.base_aligned:
        at = tl.multiple_of(at, P.tile.W)
    return tl.multiple_of(base + at, 16)


@triton.jit
def _mains(place, P: tl.constexpr):
    head, bases, starts = place.part.head, place.bases, place.starts
    if P.student.align:
        student = _main(bases.student, starts.student, head, P)
    else:
        row = bases.student + starts.student
        student = column(row, head, place.student.stride, P.student.unit)
    if P.teacher.align:
        teacher = _main(bases.teacher, starts.teacher, head, P)
    else:
        row = bases.teacher + starts.teacher
        teacher = column(row, head, place.teacher.stride, P.teacher.unit)
    if P.align_gradient:
        gradient = _main(bases.gradient, starts.gradient, head, P)
    else:
        gradient = bases.gradient + starts.gradient + head
    return Each(student=student, teacher=teacher, gradient=gradient)


@triton.jit
def sweep(
    BODY: tl.constexpr, READS: tl.constexpr, POLICY: tl.constexpr,
    state, place, given, P: tl.constexpr,
):  # fmt: skip
    """Run BODY over this program's columns: whole tiles, a tile of whole vectors, the edges.

    Args:
        BODY: (state, z, t, columns, mask, target, given, P) -> state, with tiles of transformed
            logits, pointers to the gradient and, as they are loaded, ``mask`` (None: all).
        READS: 0 nothing, 1 the student, 2 both models.
        given: what BODY needs besides.
    """
    head, first, last = place.part.head, place.part.first, place.part.last
    thread = tl.arange(0, P.tile.THREADS)[:, None]
    index = tl.arange(0, P.tile.K * P.tile.THREADS)[:, None]
    offset = index * P.tile.W + tl.arange(0, P.tile.W)[None, :]
    mains = _mains(place, P)
    step: tl.constexpr = P.tile.K * P.tile.THREADS
    whole = first + (last - first) // step * step
    for vector in range(first, whole, step):
        columns = vector * P.tile.W + offset
        state = _tile(BODY, READS, POLICY, state, place, mains, head, columns, None, given, P)
    if whole < last:
        columns = whole * P.tile.W + offset
        # One bit per vector, so that the masked accesses stay as wide as the others.
        mask = (whole + index) < last
        state = _tile(BODY, READS, POLICY, state, place, mains, head, columns, mask, given, P)
    edges = place.part.edges
    if edges > 0:
        columns = tl.where(thread < head, thread, thread + place.part.vectors * P.tile.W)
        mask = thread < edges
        state = _tile(BODY, READS, POLICY, state, place, place.rows, 0, columns, mask, given, P)
    return state


@triton.jit
def slice_of(student, vocab, member, P: tl.constexpr):
    """This program's slice of the row that begins at ``student``."""
    if P.student.align:
        address = student.to(tl.int64)
        width: tl.constexpr = P.tile.itemsize * P.tile.W
        head = ((width - address % width) % width) // P.tile.itemsize
        head = tl.minimum(head, vocab).to(tl.int32)
    else:
        head = vocab * 0
    vectors = (vocab - head) // P.tile.W
    share = tl.cdiv(vectors, P.sharing.split)
    first = tl.minimum(member * share, vectors)
    last = tl.minimum(first + share, vectors)
    edges = tl.where(member == 0, vocab - vectors * P.tile.W, 0)
    return Slice(member=member, head=head, vectors=vectors, first=first, last=last, edges=edges)


@triton.jit
def owns(part, column, P: tl.constexpr):
    """Whether this program's slice has the column."""
    at = column - part.head
    edge = (at < 0) | (at >= part.vectors * P.tile.W)
    inside = (at >= part.first * P.tile.W) & (at < part.last * P.tile.W)
    return (edge & (part.member == 0)) | inside
