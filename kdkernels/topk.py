"""A sparse teacher as callers give it, checked, and as backends get it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .entries import NORMALIZED, TAILS
from .kinds import check_kind
from .options import DIVISOR, Given, divides
from .problem import Options, contiguous, entry_dtype


class TopK(NamedTuple):
    """The arguments of :func:`kdkernels.fused_topk_kd_loss` that stand for the teacher's logits."""

    ids: Any
    log_probs: Any
    tail: str = "bucket"
    temperature: float | None = None


def options_with_tail(given: Given, options: Options, teacher: TopK) -> Options:
    """The options of a call with a sparse teacher; ValueError names one that it cannot have."""
    tail, temperature = teacher.tail, teacher.temperature
    if tail not in TAILS:
        raise ValueError(f"tail: {tail!r} is not one of {TAILS}")
    if tail == "none" and options.divergence != "forward_kl":
        raise ValueError(
            f"divergence: {given.divergence!r} compares distributions, and with tail='none' the "
            "entries are none; only 'forward_kl' is possible"
        )
    if temperature is not None:
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(
                f"teacher_temperature: expected a number, got {type(temperature).__name__}"
            )
        if not divides(temperature):
            raise ValueError(f"teacher_temperature: {temperature!r} is not {DIVISOR}")
        if temperature != options.temperature and tail not in NORMALIZED:
            raise ValueError(
                f"teacher_temperature: {temperature!r} is not temperature, which is "
                f"{options.temperature!r}: with tail={tail!r} nothing tells what the other entries "
                f"would have there; possible with {' and '.join(map(repr, NORMALIZED))}"
            )
    for name in ("logit_scale", "logit_softcap"):
        pair = getattr(given, name)
        if isinstance(pair, (tuple, list)) and pair[1] is not None:
            raise ValueError(
                f"{name}: {pair!r} has a part for the teacher, whose log-probabilities are final; "
                "give a number, or None as that part"
            )
    return options._replace(tail=tail, teacher_scale=1.0, teacher_softcap=0.0)


def checked_entries(
    student: Tensor, teacher: TopK, given: Given, options: Options, mapped: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids as :class:`~kdkernels.problem.Problem` has them.

    ``mapped``: which rows they meet is said elsewhere.
    """
    ids, log_probs = teacher.ids, teacher.log_probs
    for name, tensor in (("teacher_ids", ids), ("teacher_log_probs", log_probs)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor [..., K], got {type(tensor).__name__}")
        if tensor.ndim == 0 or not (mapped or tensor.shape[:-1] == student.shape[:-1]):
            raise ValueError(
                f"{name}: leading shape {tuple(tensor.shape[:-1])} differs from the student's "
                f"{tuple(student.shape[:-1])}"
            )
        if tensor.device != student.device:
            raise ValueError(f"{name}: device {tensor.device} differs from the student's")
    check_kind("teacher_log_probs", log_probs)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"teacher_ids: dtype {ids.dtype} is not an integer dtype")
    if ids.shape != log_probs.shape:
        raise ValueError(
            f"teacher_ids: shape {tuple(ids.shape)} differs from teacher_log_probs' "
            f"{tuple(log_probs.shape)}"
        )
    if ids.shape[-1] == 0:  # as one empty slot
        ids, log_probs = (x.new_full((*x.shape[:-1], 1), -1) for x in (ids, log_probs))
    ids = contiguous(ids, torch.int64)
    if given.vocab_policy == "truncate":
        ids = ids.masked_fill(ids >= student.shape[-1], -1)
    log_probs = contiguous(log_probs.detach(), entry_dtype(student.device))
    if teacher.temperature not in (None, options.temperature):
        log_probs = log_probs * (teacher.temperature / options.temperature)
    return log_probs, ids
