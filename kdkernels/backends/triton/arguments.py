"""What the host and the row kernel hand each other, by name. Does not import Triton."""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

from ...problem import STATISTICS


class Tensors(NamedTuple):
    """The row kernel's tensors; None where the variant does not look."""

    student: Any  # [rows of (outer, inner) strides, vocab]
    teacher: Any
    labels: Any  # int64 [rows]
    weights: Any  # float32 [rows]
    items: Any  # float32 []: the denominator of the mean
    upstream: Any  # [] or [rows]: grad_output
    loss: Any  # float32 [rows]
    statistics: Any  # float32 [Statistics + Kept, rows]
    gradient: Any  # [rows, width], rows gradient_row apart, dtype of the student
    partials: Any  # float32 [slots, exchange.PARTIALS, members]
    arrivals: Any  # int32 [groups], zero
    errors: Any  # int64 []: 1 + the highest row with a label outside the vocabulary
    # Of a sparse teacher, whose log-probabilities in base 2 are ``teacher``, float32:
    columns: Any  # int32 [rows, entries]; -1: none
    facts: Any  # float32 [rows, Facts]
    offsets: Any  # int64 [rows]: where each row's logits of the teacher begin, in another order


class Sizes(NamedTuple):
    """The row kernel's integers; strides count elements."""

    rows: Any
    inner: Any
    vocab: Any
    width: Any
    gradient_row: Any
    student_outer: Any
    student_inner: Any
    student_column: Any
    teacher_outer: Any
    teacher_inner: Any
    teacher_column: Any
    upstream_stride: Any
    ignore_index: Any
    entries: Any  # K of a sparse teacher


class Numbers(NamedTuple):
    """The row kernel's floats."""

    row_factor: Any  # what divides every row's loss, inverted
    factor: Any  # log2(e) / T
    temperature: Any
    kd_scale: Any
    alpha: Any
    smoothing: Any
    z_loss: Any
    student_scale: Any
    teacher_scale: Any
    student_softcap: Any
    teacher_softcap: Any
    first: Any  # the divergence's parameters
    second: Any


class Facts(NamedTuple):
    """What is known of a sparse teacher's row beside its entries."""

    lse: Any  # of what they were divided by; NaN: they are no distribution
    entropy: Any
    at: Any  # the column of the likeliest
    log_rest: Any  # of the mass that the others share, in base 2
    others: Any  # how many columns they are


_named: Any = namedtuple  # mypy knows no fields that are not written out
#: A row's statistics, in their order: what the caller sees of one column of the tensor.
Statistics = _named("Statistics", STATISTICS)


class Kept(NamedTuple):
    """Behind the statistics, what a backward starts from: its gradient then has the same bits as
    one that the forward computes. With a sparse teacher the second sum is that of the student's
    logits which are none of the entries."""

    top_s: Any
    sum_s: Any
    at_one: Any
    top_t: Any
    sum_t: Any
    centre: Any
    slopes: Any
