"""Run by test_linear.py: one process of a mesh of two that shards the output layer."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from kdkernels import fused_linear_kd_loss

VOCAB, HIDDEN, ROWS = 31, 8, 6  # a vocabulary that two processes cannot halve


def data(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each process has rows of its own, as in data-parallel training."""
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(ROWS, HIDDEN, generator=generator)
    teacher = torch.randn(ROWS, VOCAB, generator=generator)
    return x, teacher, torch.randint(VOCAB, (ROWS,), generator=generator)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCAB))


def loss_of(net: nn.Sequential, rank: int, gradient: str) -> torch.Tensor:
    x, teacher, labels = data(rank)
    head = net[1]
    return fused_linear_kd_loss(
        net[0](x),
        head.weight,
        labels=labels,
        student_bias=head.bias,
        teacher_logits=teacher,
        gradient=gradient,
        max_chunk_bytes=2 * 4 * 4 * VOCAB,
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(rank: int, gradient: str) -> None:
    plain = model()
    losses = [loss_of(plain, r, gradient) for r in range(2)]
    (sum(losses) / 2).backward()
    mesh = init_device_mesh("cpu", (2,))
    sharded = model()
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    loss = loss_of(sharded, rank, gradient)
    torch.testing.assert_close(loss, losses[rank])
    loss.backward()
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert ours.grad.placements == ours.placements
        torch.testing.assert_close(whole(ours.grad), theirs.grad)
    # Sharded over the hidden size, by hand; the teacher's weight, too.
    weight = distribute_tensor(plain[1].weight.detach(), mesh, [Shard(1)]).requires_grad_()
    hidden = plain[0](data(rank)[0]).detach()
    loss = fused_linear_kd_loss(hidden, weight, hidden, weight.detach() * 1.5, gradient=gradient)
    full = whole(weight).detach()
    torch.testing.assert_close(loss, fused_linear_kd_loss(hidden, full, hidden, full * 1.5))
    loss.backward()
    assert weight.grad.placements == (Shard(1),)


if __name__ == "__main__":
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for mode in ("forward", "recompute"):
        check(rank, mode)
    dist.barrier()
    dist.destroy_process_group()
    # Skip the interpreter's end: gloo's threads can still be running then, and abort.
    sys.stderr.flush()
    os._exit(0)
