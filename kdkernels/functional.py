"""The public function: checks its arguments, picks a backend, calls the op."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .backends import BACKENDS
from .dispatch import choose_backend
from .divergences import Divergence
from .kinds import check_kind
from .options import Given, check, check_takes_items, with_options_of
from .problem import (
    STATISTICS,
    Problem,
    contiguous,
    loss_dtype,
    row_scale,
    rows_that_count,
    sum_rows,
)
from .rows import Pairs, RowMaps, checked_maps, placed
from .topk import TopK, checked_entries, options_with_tail

#: ``ignore_index`` where a call without labels has rows that do not count.
_NO_LABEL = -100


class KDLossOutput(NamedTuple):
    """``fused_kd_loss(..., return_outputs=True)``. Everything but ``loss`` is detached.

    ``loss = alpha * kd_loss + (1 - alpha) * ce_loss + z_loss``, each reduced like the loss.
    ``kd_loss`` contains T^2 and ``ce_loss`` the label smoothing; ``ce_loss`` is None without
    labels. Tensors named per row have the logits' leading shape ([B, S - 1] with ``shift``, [M], by
    pairs, with ``student_rows`` or ``teacher_rows``). Rows that do not count, by their label or a
    token weight of 0, hold 0 there and are in no share, whatever their logits are. A row in which a
    model's logits are no distribution (NaN, +inf, nothing but -inf) has NaN in all of them and is a
    miss in both shares; with ``alpha=0``, where the loss does not contain the teacher, such a
    teacher has it in what is the teacher's and is a miss in ``agreement``. Entropies are in nats,
    of the distributions at temperature T.
    """

    loss: Tensor
    kd_loss: Tensor
    ce_loss: Tensor | None
    z_loss: Tensor
    student_lse: Tensor  #: per row, log sum exp(z_s / T)
    teacher_lse: Tensor  #: per row, log sum exp(z_t / T)
    label_lse: Tensor  #: per row, log sum exp(z_s)
    student_entropy: Tensor  #: per row
    teacher_entropy: Tensor  #: per row
    agreement: Tensor  #: [], share of counted rows in which both models' top entries are the same
    accuracy: (
        Tensor | None
    )  #: [], share of counted rows in which the student's top entry is the label


def fused_kd_loss(  # noqa: PLR0913
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    divergence: str | Divergence = "forward_kl",
    beta: float = 0.5,
    temperature_squared: bool = True,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    logit_scale: float | tuple[float | None, float | None] | None = None,
    vocab_policy: str = "error",
    student_rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    shift: bool = False,
    gradient: str = "auto",
    backend: str | None = None,
    return_outputs: bool = False,
) -> Tensor | KDLossOutput:
    """Knowledge-distillation loss; ``alpha`` is the weight of the DISTILLATION term.

    For each row (token) with student logits z_s, teacher logits z_t and label y::

        alpha * T^2 * D(softmax(z_t / T), softmax(z_s / T)) + (1 - alpha) * CE(z_s, y)
            + z_loss * logsumexp(z_s)^2

    D is KL(teacher || student) by default. Loss and gradient are computed together, chunk by chunk
    or fused, without a [rows, vocab] probability in memory. Hinton et al. 2015, arXiv:1503.02531.

    Args:
        student_logits: [..., V], float32, bfloat16, float16 or float64; any strides. Only read.
        teacher_logits: [..., V], same leading shape (unless rows are named, see ``student_rows``)
            and device, any of these dtypes. Treated as a constant (detached). Only read.
        labels: [...], any integer dtype. ``ignore_index`` rows count in neither term and are not
            read.
        temperature: T of both softmaxes in D, from 1e-18 to 1e18. The cross-entropy is always at
            T = 1.
        alpha: weight of D, of magnitude up to 1e18. None: 0.5 with labels, 1 without. Without
            labels only 1 is possible.
        divergence: a name of :mod:`kdkernels.divergences` (``forward_kl``, ``reverse_kl``, ``jsd``,
            ``tvd``, ``skew_forward_kl``, ``skew_reverse_kl``, ``alpha_beta``) or an object.
        beta: weight of the teacher in the mixture of ``jsd`` (0: forward KL, 1: reverse KL),
            ``skew_forward_kl`` and ``skew_reverse_kl``. Another divergence accepts only the
            default.
        temperature_squared: multiply D by T^2, which keeps the scale of its gradient as T grows.
        reduction: ``"mean"`` over the rows that count (0 if none does), ``"sum"`` or ``"none"``.
        num_items: denominator of ``"mean"`` instead of the number of rows that count, for gradient
            accumulation: a number from 1e-18 to 1e18 or a tensor of one element (0 divides by 1).
            No device sync.
        token_weights: [...], weight of each row's loss; negative ones are allowed. Not
            differentiable. A row of weight 0 is not read, as one that is ignored. They do not enter
            the denominator: for a weighted mean pass ``num_items=token_weights.sum()``.
        ignore_index: the label of rows that do not count.
        label_smoothing: in [0, 1], of the cross-entropy; needs labels.
        z_loss: from 0 to 1e18, weight of logsumexp(z_s)^2 (PaLM, arXiv:2204.02311); independent of
            alpha.
        logit_softcap: c from 1e-18 to 1e18: z -> c * tanh(z / c) (Gemma 2, arXiv:2408.00118),
            applied after ``logit_scale``. One number for both models or (student, teacher), None
            for neither.
        logit_scale: factor of the logits, of magnitude 1e-18 to 1e18. One number for both or
            (student, teacher).
        vocab_policy: what to do if the vocabularies differ in size: ``"error"``, or ``"truncate"``
            to the common prefix (for both terms; the gradient of the rest is 0).
        student_rows, teacher_rows: [M], int32 or int64, which rows meet: pair i is row
            ``student_rows[i]`` of the student's logits and row ``teacher_rows[i]`` of the
            teacher's, counted through their leading dimensions, which may then differ. The loss is
            that of ``student_logits[student_rows]`` and ``teacher_logits[teacher_rows]`` without
            these copies. One of them may be None: all rows of that model in order. With either,
            labels and token_weights are [M], one entry a pair, and so are the loss of ``"none"``
            and what :class:`KDLossOutput` has per row. The gradient has the student's shape, and is
            0 in rows that no pair names. A row of the teacher's may be named several times, one of
            the student's may not; negative indices are none. Not with ``shift``.
        shift: next-token shift: logits [B, S, V] at position s are compared with labels (and
            token_weights) [B, S] at s + 1, without a copy of the logits. The last position does not
            count.
        gradient: ``"forward"`` computes it with the loss and stores it (one [..., V] tensor in the
            student's dtype); ``"recompute"`` computes it in the backward, with grad_output applied
            in float32 before rounding; ``"auto"`` is ``"forward"``, except for reduction ``"none"``
            and for float16, whose stored gradient would underflow under a GradScaler: on the
            backend "cpu" it is stored for the grad_output of the backward before this one and
            recomputed if another one comes (to the same bits), elsewhere it is recomputed. Where it
            may be recomputed, teacher logits, labels and weights that were made under
            ``inference_mode`` are copied until the backward, since nothing tells when they are
            overwritten; overwriting those of ``no_grad`` is an error, as elsewhere in PyTorch.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"``, ``"reference"``, or None for the
            fastest that can run it.
        return_outputs: return a :class:`KDLossOutput`.

    Returns:
        The loss in float32 (float64 for a float64 student): [], or [...] for ``"none"`` ([M] with
        ``student_rows`` or ``teacher_rows``).

    Raises:
        TypeError, ValueError: an argument has the wrong type, value or shape; named in the message.
        IndexError: a label outside [0, V) that is not ``ignore_index``; a row to meet that there
            is not, or one of the student's named twice. Only a CPU can raise without a
            synchronisation: elsewhere that row's loss and gradient are NaN, and with the backends
            "cuda" and "triton" :func:`kdkernels.label_errors` tells the row (the student's, but for
            one that there is not).
        RuntimeError: the named backend cannot run this problem; the message says why and which can.
    """
    # By position, which takes half the time; in the order of the signature.
    given = Given(
        temperature,
        alpha,
        divergence,
        beta,
        temperature_squared,
        reduction,
        None if isinstance(num_items, Tensor) else num_items,
        ignore_index,
        label_smoothing,
        z_loss,
        logit_softcap,
        logit_scale,
        vocab_policy,
        shift,
        gradient,
        backend,
        return_outputs,
    )
    rows = (student_rows, teacher_rows)
    call = _prepared(student_logits, teacher_logits, labels, num_items, token_weights, rows, given)
    return compute(call, return_outputs)


@with_options_of(fused_kd_loss)
def fused_topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    tail: str = "bucket",
    teacher_temperature: float | None = None,
    **options: Any,
) -> Tensor | KDLossOutput:
    """:func:`fused_kd_loss` of a teacher of which a row has K entries, not V logits.

    Such are the top K of a cache or of a served teacher, or samples of it. Nothing of the size of
    the teacher's vocabulary is made of them. With p the teacher's, q the student's probabilities at
    the temperature, ``tail`` says what is known of the other V - K:

    ``"bucket"``
        D of K + 1 categories, the entries and all others together: p_rest = 1 - sum(p), and q_rest
        what the student gives to the others. Assumes nothing, and is at most the D of the whole
        distributions (coarse-graining; Cover and Thomas 2006, section 2.7 for the KLs).
    ``"uniform"``
        D of V entries, p_rest spread evenly over the others.
    ``"renormalize"``
        D of V entries, p / sum(p) at the K entries and 0 at the others.
    ``"subset"``
        D of K entries, p and q both divided by their sums over them. The student's others have no
        gradient from it.
    ``"none"``
        sum p (log p - log q) over the entries as they are. For samples of the teacher with weights
        that add up to 1 in expectation (Anshumann et al. 2025, arXiv:2503.16870): weights of one id
        add up. Only the forward KL; it may be negative.

    A row without an entry has D = 0.

    Args:
        student_logits: [..., V], as in ``fused_kd_loss``.
        teacher_ids: [..., K], any integer dtype, same leading shape and device; which entries of
            the vocabulary. Negative: an empty slot. In any order; none twice, but for ``"none"``.
        teacher_log_probs: [..., K], natural logarithms of probabilities, float32, bfloat16, float16
            or float64; -inf is legal. Not read in empty slots. A constant (detached). With
            ``teacher_rows`` rows of entries are named as those of logits are.
        labels: [...], as in ``fused_kd_loss``; a label need not be among the entries.
        tail: see above.
        teacher_temperature: of ``teacher_log_probs``; None: ``temperature``. Another one only with
            ``"renormalize"`` and ``"subset"``, where p^(teacher_temperature / temperature) is
            divided by its sum.
        options: as in ``fused_kd_loss``. ``logit_softcap`` and ``logit_scale`` are the student's
            alone. With ``vocab_policy="truncate"`` ids from V on are empty slots.

    Returns:
        As ``fused_kd_loss``. By ``return_outputs``, ``teacher_entropy`` is that of what is
        compared, ``teacher_lse`` the logarithm of what p was divided by (0 where by nothing), and
        ``agreement`` the share of rows whose likeliest id is the student's top entry.

    Raises:
        TypeError, ValueError, RuntimeError: as ``fused_kd_loss``. ValueError also where the entries
            of a row have a mass above 1.1 (logits, say, under ``"bucket"`` or ``"uniform"``).
        IndexError: an id from V on, or one that comes twice, or a bad label. On other devices than
            a CPU such a row's loss and gradient are NaN, as is one whose mass is above 1.1.
    """
    given = with_defaults("fused_topk_kd_loss", options)
    teacher = TopK(teacher_ids, teacher_log_probs, tail, teacher_temperature)
    call = prepare(student_logits, teacher, labels, **given)
    return compute(call, given["return_outputs"])


def with_defaults(function: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of :func:`fused_kd_loss`: these, and its defaults; TypeError for another one."""
    known = fused_kd_loss.__kwdefaults__ or {}
    if unknown := set(options) - set(known):
        raise TypeError(f"{function} has no option {', '.join(sorted(unknown))}")
    return {**known, **options}


def compute(call: Call, return_outputs: bool) -> Tensor | KDLossOutput:
    """The loss of a checked call."""
    differentiable = call.problem.student.requires_grad and torch.is_grad_enabled()
    foreseen = differentiable and call.gradient == "foreseen"
    expected = ops.GRAD_OUTPUT.expected() if foreseen else None
    store = (differentiable and call.gradient == "forward") or expected is not None
    loss, statistics = ops.kd_loss(call.problem, call.backend, store, return_outputs, expected)
    return finish(call, loss, statistics, return_outputs)


class Call(NamedTuple):
    """A checked call: what to compute, on which backend, and how to hand the results out."""

    problem: Problem
    backend: str
    gradient: str  # "forward", "recompute", or "foreseen": stored for the grad_output of before
    shift: bool
    with_labels: bool
    pairs: Pairs | None  # of a call with row maps


def prepare(
    student_logits: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor | None,
    *,
    num_items: float | Tensor | None,
    token_weights: Tensor | None,
    student_rows: Tensor | None,
    teacher_rows: Tensor | None,
    **options: Any,
) -> Call:
    """Check every argument of :func:`fused_kd_loss`, by its names, and choose the backend."""
    given = Given(num_items=None if isinstance(num_items, Tensor) else num_items, **options)
    rows = (student_rows, teacher_rows)
    return _prepared(student_logits, teacher, labels, num_items, token_weights, rows, given)


def _prepared(
    student_logits: Tensor,
    given_teacher: Tensor | TopK,
    labels: Tensor | None,
    num_items: float | Tensor | None,
    token_weights: Tensor | None,
    rows: tuple[Tensor | None, Tensor | None],
    given: Given,
) -> Call:
    settings = check(given, labels is not None)
    _check_tensor("student_logits", student_logits)
    options, ids = settings.options, None
    mapped = rows[0] is not None or rows[1] is not None
    if isinstance(given_teacher, TopK):
        options = options_with_tail(given, options, given_teacher)
        teacher, ids = checked_entries(student_logits, given_teacher, given, options, mapped)
    else:
        _check_pair(student_logits, given_teacher, settings.vocab_policy, mapped)
        teacher = given_teacher.detach() if given_teacher.requires_grad else given_teacher
    maps, pairs, shape = None, None, student_logits.shape[:-1]
    if mapped:
        maps, pairs = checked_maps(RowMaps(*rows), student_logits, teacher, settings.shift)
        shape = pairs.shape
    mask = _row_tensor("labels", labels, student_logits, shape)
    weights = _row_tensor("token_weights", token_weights, student_logits, shape)
    if mask is None and (settings.shift or mapped):
        # The mask that stands for them is ours: no index of a vocabulary.
        options = options._replace(ignore_index=_NO_LABEL)
    if settings.shift:
        mask, weights = _shifted(student_logits, mask, weights, options.ignore_index)
    items = None
    if isinstance(num_items, Tensor):
        items = _item_tensor(num_items, student_logits, options.reduction)
    problem = Problem(student_logits, teacher, mask, weights, items, options, ids)
    if maps is not None:
        problem = placed(problem, maps)
    name = choose_backend(problem, settings.backend, extras=settings.return_outputs)
    gradient = settings.gradient
    if gradient == "auto":
        gradient = _gradient_mode(problem, name)
    return Call(problem, name, gradient, settings.shift, labels is not None, pairs)


def _gradient_mode(problem: Problem, backend: str) -> str:
    """The mode of "auto"."""
    if problem.options.reduction == "none":
        return "recompute"
    if problem.student.dtype != torch.float16:
        return "forward"
    traced = torch.compiler.is_compiling() or type(problem.student) not in ops.PLAIN
    return "foreseen" if BACKENDS[backend].foresees and not traced else "recompute"


def finish(
    call: Call, loss: Tensor, statistics: Tensor, return_outputs: bool
) -> Tensor | KDLossOutput:
    """What the caller asked for, from what the op returned."""
    if call.problem.options.reduction == "none":
        loss = _per_row(call, loss)
    elif call.pairs is not None:
        loss = call.pairs.reduced(loss)
    return _outputs(call, loss, statistics) if return_outputs else loss


def _check_tensor(name: str, tensor: Any) -> None:
    """TypeError or ValueError unless these are logits [..., vocab]."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor [..., vocab], got {type(tensor).__name__}")
    check_kind(name, tensor)
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} has no vocabulary dimension")


def _check_pair(student: Tensor, teacher: Any, vocab_policy: str, mapped: bool) -> None:
    _check_tensor("teacher_logits", teacher)
    same_shape = student.shape == teacher.shape
    if not (same_shape or mapped or student.shape[:-1] == teacher.shape[:-1]):
        raise ValueError(
            f"teacher_logits: leading shape {tuple(teacher.shape[:-1])} differs from "
            f"student_logits' {tuple(student.shape[:-1])}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher_logits: device {teacher.device} differs from student_logits' {student.device}"
        )
    if not same_shape and student.shape[-1] != teacher.shape[-1] and vocab_policy == "error":
        raise ValueError(
            f"teacher_logits: vocabulary {teacher.shape[-1]} differs from student_logits' "
            f"{student.shape[-1]}; vocab_policy='truncate' compares the common prefix"
        )


def _row_tensor(
    name: str, tensor: Tensor | None, student: Tensor, shape: tuple[int, ...]
) -> Tensor | None:
    """``labels`` as contiguous int64 or ``token_weights`` as contiguous float32, checked.

    ``shape``: of the rows, or of the pairs.
    """
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        whose = "logits' leading shape" if shape == student.shape[:-1] else "pairs of rows,"
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} differs from the {whose} {tuple(shape)}"
        )
    if tensor.device != student.device:
        raise ValueError(
            f"{name}: device {tensor.device} differs from the logits' {student.device}"
        )
    if name == "labels":
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"labels: dtype {tensor.dtype} is not an integer dtype")
        return contiguous(tensor, torch.int64)
    if tensor.is_complex():
        raise TypeError(f"token_weights: dtype {tensor.dtype} is not real")
    if tensor.requires_grad:
        raise ValueError("token_weights: requires grad, but is not differentiable; pass .detach()")
    return contiguous(tensor, torch.float32)


def _shifted(
    student: Tensor, labels: Tensor | None, weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Labels and weights moved one position to the left: only these [B, S] tensors are copied.

    Without labels the result is a mask: 0, which any vocabulary has, in the rows that count.
    """
    if student.ndim != 3:
        raise ValueError(f"shift: needs logits [B, S, V], got shape {tuple(student.shape)}")
    shifted = torch.full(student.shape[:-1], ignore_index, dtype=torch.int64, device=student.device)
    if labels is None:
        shifted[:, :-1] = 0
    else:
        shifted[:, :-1] = labels[:, 1:]
    if weights is not None:
        weights = torch.cat([weights[:, 1:], weights[:, :1]], dim=1)
    return shifted, weights


def _item_tensor(num_items: Tensor, student: Tensor, reduction: str) -> Tensor:
    check_takes_items(num_items, reduction)
    if num_items.numel() != 1 or num_items.is_complex():
        raise ValueError(f"num_items: shape {tuple(num_items.shape)} is not one real element")
    return num_items.detach().reshape(()).to(student.device, loss_dtype(student))


def _per_row(call: Call, row: Tensor) -> Tensor:
    """What the backend has of its rows, of those that the caller knows."""
    if call.pairs is not None:
        return call.pairs.of(row)
    return row[:, :-1] if call.shift else row


def _outputs(call: Call, loss: Tensor, statistics: Tensor) -> KDLossOutput:
    problem = call.problem
    rows = dict(zip(STATISTICS, statistics.detach()[: len(STATISTICS)], strict=True))
    counted = rows_that_count(problem)
    scale = row_scale(problem)
    if isinstance(scale, Tensor) and scale.ndim:
        scale = scale.reshape(problem.leading_shape)

    per_row = functools.partial(_per_row, call)

    def reduced(row: Tensor) -> Tensor:
        weighted = row * scale
        if problem.options.reduction == "none":
            return per_row(weighted)
        total = sum_rows(weighted)
        return total if call.pairs is None else call.pairs.reduced(total)

    def share(hit: Tensor) -> Tensor:
        total: int | Tensor = max(problem.rows, 1)
        if counted is not None:
            hit, total = hit & counted.reshape(hit.shape), counted.sum().clamp(min=1)
        # A quotient of integers would be of the default dtype, which may be bfloat16.
        return hit.sum().to(problem.math_dtype) / total

    hits = rows["hits"]
    return KDLossOutput(
        loss=loss,
        kd_loss=reduced(rows["kd"]),
        ce_loss=reduced(rows["ce"]) if call.with_labels else None,
        z_loss=reduced(rows["z"]),
        student_lse=per_row(rows["student_lse"]),
        teacher_lse=per_row(rows["teacher_lse"]),
        label_lse=per_row(rows["label_lse"]),
        student_entropy=per_row(rows["student_entropy"]),
        teacher_entropy=per_row(rows["teacher_entropy"]),
        agreement=share((hits == 1) | (hits == 3)),
        accuracy=share(hits >= 2) if call.with_labels else None,
    )
