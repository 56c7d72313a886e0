"""Fused linear distillation: from hidden states to the loss, the logits only in small tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .functional import (
    Call,
    KDLossOutput,
    finish,
    fused_kd_loss,
    prepare,
    with_defaults,
)
from .kinds import check_kind, is_dtensor
from .linear_op import linear_kd_forward
from .linear_tiles import STUDENT, TEACHER
from .options import check_chunk_bytes, with_options_of
from .problem import loss_dtype
from .rows import ROW_MAPS
from .topk import TopK
from .torch_private import constant_result

#: Default memory for tiles of logits on a CPU. Two tiles in float32 are alive: the student's, whose
#: memory its gradient takes over, and the teacher's. Smaller ones read and write the weight's
#: gradient more often: with 32, 64, 128, 512 and 1024 MiB the CPU time is 1.37, 1.15, 1.06, 1.06
#: and 1.01 times that of 256 (1024 tokens, H = 512, V = 50257, float32; Zen 3, two threads;
#: interleaved, medians of 7 ratios on a busy machine; the last two make the same single tile, so
#: they differ by the error). ``python -m benchmarks --workloads linear_chunk`` measures it again.
MAX_CHUNK_BYTES = 256 << 20

#: The part of a GPU's memory that tiles of logits take by default: 4.4 GiB of an H200's, 2.5 GiB
#: of an 80 GB H100's. Where that holds all rows in one tile, the weight's gradient is one product,
#: and needs no float32 sum of its size. Milliseconds beyond the products' 25.9 on an H200, from the
#: bytes that each step moves at 4.3 TB/s (4096 tokens, H = 4096, V = 128256, bfloat16: the float32
#: tiles of all rows are 2.1 GB each, the weight's float32 gradient is another 2.1 GB):
#:
#: ==================================================  ====  ====  ====  ====
#: tiles                                                  1     2     4    16
#: ==================================================  ====  ====  ====  ====
#: logits written in float32 instead of bfloat16        0.5   0.5   0.5   0.5
#: loss and gradient (measured; the bytes take 1.5)     2.7   2.7   2.7   2.7
#: gradient rounded to bfloat16: 3.2 GB                 0.7   0.7   0.7   0.7
#: weight's gradient added to: 4.2 GB a further tile      0   1.0   2.9  14.7
#: weight's gradient rounded: 3.2 GB                      0   0.7   0.7   0.7
#: sum                                                  3.9   5.6   7.5  19.3
#: measured when it was zeroed and added to in pieces   8.8        15.1  49.6
#: ==================================================  ====  ====  ====  ====
#:
#: Tiles in bfloat16 would take 1.5 in place of the first three lines. There are none: rounded
#: logits cost other fused losses 4 to 23 % of the gradient where the loss looks right
#: (Liger-Kernel#1432), and this function is held to float32's accuracy.
GPU_MEMORY_SHARE = 1 / 32


@with_options_of(fused_kd_loss, *ROW_MAPS)
def fused_linear_kd_loss(  # noqa: PLR0913
    student_hidden: Tensor | None = None,
    student_weight: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    tail: str = "bucket",
    teacher_temperature: float | None = None,
    max_chunk_bytes: int | None = None,
    return_outputs: bool = False,
    **options: Any,
) -> Tensor | KDLossOutput:
    """:func:`kdkernels.fused_kd_loss` of two output layers, without their logits in memory.

    With ``student_logits = student_hidden @ student_weight.T + student_bias`` and the teacher's
    likewise, the result is that of ``fused_kd_loss(student_logits, teacher_logits, labels,
    **options)``, and the gradients of student hidden states, weight and bias are computed with the
    loss, tile by tile of rows. Rows that do not count, by their label or a token weight of 0, reach
    no gradient, whatever their hidden states hold. On the CPU they are not even multiplied.

    Tiles of logits are float32 (float64 for float64 hidden states) whatever the inputs' dtypes, and
    the gradients are summed in that precision over the tiles and rounded once. Where bfloat16
    products are native (:mod:`kdkernels.products`), a tile's gradient is rounded to it before its
    products, if hidden states and weight are bfloat16.

    Args:
        student_hidden, teacher_hidden: [..., H_s] and [..., H_t], any floating dtype; H may differ.
        student_weight, teacher_weight: [V, H_s] and [V, H_t]. A DTensor (FSDP2) is gathered once a
            call, and its gradient is the mean over the processes of its mesh, scattered back, as
            FSDP2 itself reduces: every process of the mesh has to call this function, and its
            backward. A weight that ZeRO-3 has partitioned needs
            ``deepspeed.zero.GatheredParameters`` around the call. Tied embeddings are an ordinary
            case: autograd sums the gradients of both uses.
        labels: [...], as in ``fused_kd_loss``.
        student_bias, teacher_bias: [V], may hold -inf (entries of the vocabulary that are masked
            in both models).
        student_logits, teacher_logits: [..., V] instead of that model's hidden states and weight
            (logits cached from an earlier run, say). One model at least must have hidden states.
        teacher_ids, teacher_log_probs: [..., K] instead of the teacher's hidden states and weight,
            as in :func:`kdkernels.fused_topk_kd_loss`, whose loss this then is: the teacher's
            entries of a tile are all that is read of it. With them the tiles are the student's
            alone, of twice as many rows.
        tail, teacher_temperature: as in ``fused_topk_kd_loss``; only with ``teacher_ids``.
        max_chunk_bytes: memory of the tiles of logits and of copies of their rows' hidden states,
            > 0; half-precision weights need pieces in float32 beside it (16 MiB on a CPU; none
            where their products have float32 results). None: 256 MiB on a CPU, which hold 667 rows
            of a 50k vocabulary and 220 of a 152k one (more was not faster; 32 MiB took 1.37 times
            the CPU time), and a 32nd of a GPU's memory: a weight's gradient that needs several
            tiles is summed in float32, 4.2 GB of traffic each at [128256, 4096].
        return_outputs, options: as ``fused_kd_loss``. ``gradient="recompute"`` multiplies the heads
            again in the backward instead of storing gradients; reduction "none" needs it, and
            "auto" is it for given float16 ``student_logits``. Inputs that were made under
            ``inference_mode``, weights too, are then copied until the backward.

    Returns:
        As ``fused_kd_loss``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``fused_kd_loss``.
    """
    options = with_defaults("fused_linear_kd_loss", options)
    _refuse_row_maps(options)
    check_chunk_bytes(max_chunk_bytes)
    student = (student_hidden, _gathered(student_weight), _gathered(student_bias), student_logits)
    teacher = (teacher_hidden, _gathered(teacher_weight), _gathered(teacher_bias), teacher_logits)
    _check_source(STUDENT, student)
    given = TopK(teacher_ids, teacher_log_probs, tail, teacher_temperature)
    sparse = given if _is_sparse(given, teacher) else None
    if sparse is None:
        _check_source(TEACHER, teacher)
    _check_has_hidden(student_logits, teacher_logits, sparse)
    call = _prepare(student, sparse or teacher, labels, options)
    if sparse is not None:
        teacher = (None, None, None, call.problem.teacher)
    if max_chunk_bytes is None:
        max_chunk_bytes = _default_chunk_bytes(call.problem.student.device)
    grad = torch.is_grad_enabled() and call.gradient == "forward"
    loss, statistics, *_ = linear_kd_forward(
        *student,
        *(None if tensor is None else tensor.detach() for tensor in teacher),
        call.problem.labels,
        call.problem.token_weights,
        call.problem.num_items,
        call.problem.teacher_ids,
        *call.problem.options,
        call.backend,
        max_chunk_bytes,
        [grad and tensor is not None and tensor.requires_grad for tensor in student],
        return_outputs,
    )
    return finish(call, loss, statistics, return_outputs)


@constant_result
def _default_chunk_bytes(device: torch.device) -> int:
    """The default ``max_chunk_bytes``: it depends on the device alone, so that results do."""
    if device.type != "cuda":
        return MAX_CHUNK_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(MAX_CHUNK_BYTES, int(memory * GPU_MEMORY_SHARE))


class _Gather(torch.autograd.Function):
    """A DTensor as a whole. Its gradient is the mean over the mesh, placed as the DTensor is."""

    @staticmethod
    def forward(ctx: Any, sharded: Any) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        return sharded.full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        partial = [Partial()] * ctx.mesh.ndim
        summed = DTensor.from_local(gradient, ctx.mesh, partial, run_check=False)
        return summed.redistribute(placements=ctx.placements) / ctx.mesh.size()


def _gathered(tensor: Any) -> Any:
    """A sharded weight or bias as a whole; differentiable."""
    return _Gather.apply(tensor) if is_dtensor(tensor) else tensor


def _is_sparse(given: TopK, dense: Sequence[Any]) -> bool:
    """Whether the teacher is entries; ValueError if half of them is given, or another beside."""
    if given.ids is None and given.log_probs is None:
        if (given.tail, given.temperature) != (TopK(None, None).tail, None):
            raise ValueError(
                f"tail, teacher_temperature: {given.tail!r}, {given.temperature!r} have no effect "
                "without teacher_ids and teacher_log_probs"
            )
        return False
    if given.ids is None or given.log_probs is None:
        raise ValueError("teacher_ids, teacher_log_probs: one is given without the other")
    beside = [name for name, one in zip(TEACHER, dense, strict=True) if one is not None]
    if beside:
        raise ValueError(f"teacher_ids: given next to {', '.join(beside)}")
    return True


def _refuse_row_maps(options: dict[str, Any]) -> None:
    for name in ROW_MAPS:
        if options[name] is not None:
            raise ValueError(
                f"{name}: fused_linear_kd_loss does not take it; a copy of hidden states costs "
                "little: pass student_hidden[index], teacher_hidden[index]"
            )


def _check_has_hidden(student_logits: Any, teacher_logits: Any, sparse: TopK | None) -> None:
    """ValueError unless there is an output layer, of which alone tiles are made."""
    if student_logits is None:
        return
    if sparse is not None:
        raise ValueError("student_logits, teacher_ids: both given; that is fused_topk_kd_loss")
    if teacher_logits is not None:
        raise ValueError("student_logits, teacher_logits: both given; that is fused_kd_loss")


def _check_source(names: Sequence[str], source: Sequence[Any]) -> None:
    """One model's inputs: either logits alone or hidden states with a weight and maybe a bias."""
    for name, tensor in zip(names, source, strict=True):
        if tensor is not None:
            _check_tensor(name, tensor)
    hidden, weight, bias, logits = source
    if logits is not None:
        if any(tensor is not None for tensor in source[:3]):
            raise ValueError(f"{names[3]}: given next to {names[0]}, {names[1]} or {names[2]}")
    elif hidden is None or weight is None:
        raise ValueError(f"{names[0]}, {names[1]}: both are needed unless {names[3]} is given")
    else:
        _check_layer(names, hidden, weight, bias)


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_kind(name, tensor)


def _check_layer(names: Sequence[str], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError unless the shapes and devices of an output layer fit."""
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{names[1]}: partitioned by DeepSpeed ZeRO-3; call within "
            "deepspeed.zero.GatheredParameters(weight)"
        )
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[1]}: shape {tuple(weight.shape)} is not [V, H] with H the last size of "
            f"{names[0]} {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]}: shape {tuple(bias.shape)} is not ({weight.shape[0]},)")
    for name, tensor in zip(names[1:3], (weight, bias), strict=True):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: device {tensor.device} differs from {hidden.device}")


def _prepare(
    student: Sequence[Any],
    teacher: Sequence[Any] | TopK,
    labels: Tensor | None,
    options: dict[str, Any],
) -> Call:
    """Checks and backend of the equivalent call on logits, which are stand-ins."""
    logits = student[3]
    if options["gradient"] == "auto" and options["reduction"] != "none":
        # Of float16 hidden states, too, since it is stored in float32. But a given float16 tensor's
        # gradient is a float16 tensor, in which a GradScaler's factor would come too late.
        rounded = logits is not None and logits.dtype == torch.float16
        options["gradient"] = "recompute" if rounded else "forward"
    if options["gradient"] == "forward" and options["reduction"] == "none":
        raise ValueError(
            "gradient: 'forward' is impossible with reduction 'none': the gradient of a weight "
            "depends on every row's grad_output; 'recompute' is possible"
        )
    dense = teacher if isinstance(teacher, TopK) else _stand_in(teacher)
    return prepare(_stand_in(student), dense, labels, **options)


def _stand_in(source: Sequence[Any]) -> Tensor:
    """The model's logits, or a tensor of one element expanded to their shape."""
    hidden, weight, _, logits = source
    if logits is not None:
        return logits
    one = torch.empty((1,), dtype=loss_dtype(hidden), device=hidden.device)
    return one.expand(*hidden.shape[:-1], weight.shape[0])
