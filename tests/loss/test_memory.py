"""The kept memory of the last CPU gradient: reused when nobody can see it, and only then."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels
from kdkernels import fused_kd_loss
from kdkernels.backends.base import empty_gradient, gradient_strides, has_rows, row_stride
from kdkernels.memory import GRADIENT_MEMORY, GradientMemory

SHAPE = torch.Size((96, 4099))  # 1.5 MiB in float32: above the smallest kept block


@pytest.fixture(autouse=True)
def empty_slot() -> None:
    GRADIENT_MEMORY.release()


def gradient(student: Tensor, teacher: Tensor) -> Tensor:
    student.grad = None
    fused_kd_loss(student, teacher).backward()
    assert student.grad is not None
    return student.grad


def test_the_next_step_reuses_the_memory_with_the_same_result() -> None:
    student, teacher = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    first = gradient(student, teacher)
    address, copy = first.data_ptr(), first.clone()
    del first
    again = gradient(student, teacher)
    assert again.data_ptr() == address
    assert torch.equal(again, copy)


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda tensor: tensor,
    "view": lambda tensor: tensor[3:, ::2],
    "numpy": lambda tensor: tensor.numpy(),
    "other dtype": lambda tensor: tensor.view(torch.int32),
    "storage": lambda tensor: tensor.untyped_storage(),
    "a view's storage": lambda tensor: tensor[5:].untyped_storage(),
    "iterator over the storage": lambda tensor: iter(tensor.untyped_storage()),
    "storage in a container": lambda tensor: {"saved": [tensor.untyped_storage()]},
    "DLPack": lambda tensor: tensor.__dlpack__(),
    "DLPack's tensor": torch.from_dlpack,
    "buffer": lambda tensor: memoryview(tensor.numpy()),
    "weak reference and a tensor": lambda tensor: (weakref.ref(tensor.untyped_storage()), tensor),
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_memory_that_anything_refers_to_is_not_touched(holder: Callable[[Tensor], Any]) -> None:
    memory = GradientMemory()
    address = memory.take(SHAPE, torch.float32).data_ptr()
    held = [holder(memory.take(SHAPE, torch.float32))]
    assert memory.take(SHAPE, torch.float32).data_ptr() != address
    held.clear()
    address = memory.take(SHAPE, torch.float32).data_ptr()
    assert memory.take(SHAPE, torch.float32).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_storage_that_is_held_keeps_its_gradient(dtype: torch.dtype) -> None:
    """A checkpoint writer or an offloader holds storages while the next step runs."""
    shape = (200, 4099)
    student, teacher = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape)
    storage = gradient(student, teacher).untyped_storage()
    bytes_of = torch.empty(0, dtype=torch.uint8)
    before = bytes_of.set_(storage).clone()
    bytes_of.set_()
    for _ in range(2):
        gradient(torch.randn(shape, dtype=dtype, requires_grad=True), teacher)
    student.grad = None
    gradient(student, -teacher)
    assert torch.equal(bytes_of.set_(storage), before)


def test_two_losses_alive_at_once_have_two_gradients() -> None:
    students = [torch.randn(SHAPE, requires_grad=True) for _ in range(2)]
    teacher = torch.randn(SHAPE)
    losses = [fused_kd_loss(student, teacher) for student in students]
    for loss in losses:
        loss.backward()
    got = [student.grad.clone() for student in students]
    for student, one in zip(students, got, strict=True):
        assert torch.equal(gradient(student, teacher), one)


def test_at_most_one_block_is_kept_and_sizes_may_change() -> None:
    memory = GradientMemory()
    large = memory.take(torch.Size((2000, 1000)), torch.float32)
    block = memory._kept
    del large
    small = memory.take(torch.Size((300, 1000)), torch.float32)
    assert memory._kept is not block, "a block twice too large must not be kept for a small one"
    assert memory._kept is not None and memory._kept.nbytes() < 4 << 20
    assert small.shape == (300, 1000) and small.is_contiguous()
    memory.release()
    assert memory._kept is None
    assert small.fill_(1.0).sum() == 300_000


def test_small_gradients_and_the_switch_leave_it_to_the_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = GradientMemory()
    memory.take(torch.Size((8, 1000)), torch.float32)
    assert memory._kept is None
    monkeypatch.setenv("KDKERNELS_KEEP_GRADIENT_MEMORY", "0")
    memory.take(SHAPE, torch.float32)
    assert memory._kept is None


def test_release_memory_is_public() -> None:
    student, teacher = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    gradient(student, teacher)
    assert GRADIENT_MEMORY._kept is not None
    kdkernels.release_memory()
    assert GRADIENT_MEMORY._kept is None


def test_threads_never_share_a_block() -> None:
    memory = GradientMemory()
    clashes = []

    def work(mark: float) -> None:
        for _ in range(50):
            mine = memory.take(SHAPE, torch.float32)
            mine.fill_(mark)
            if not bool((mine == mark).all()):
                clashes.append(mark)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes


def test_gradients_are_ordinary_tensors() -> None:
    student, teacher = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    optimizer = torch.optim.SGD([student], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)  # detaches in place, which a view would refuse
        fused_kd_loss(student, teacher).backward()
        optimizer.step()
    assert student.grad is not None and not student.grad._is_view()


def rows_of(columns: int, used: int, *leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first ``used`` columns of rows of so many."""
    return torch.empty((*leading, columns), dtype=dtype)[..., :used]


STUDENTS: dict[str, tuple[Tensor, tuple[int, ...]]] = {
    "packed": (torch.empty(3, 67), (67, 1)),
    "padded": (rows_of(72, 67, 3), (72, 1)),
    "padded bfloat16": (rows_of(50304, 50257, 2, dtype=torch.bfloat16), (50304, 1)),
    "a batch": (rows_of(72, 67, 2, 3), (216, 72, 1)),
    "without its last position": (rows_of(72, 67, 2, 4)[:, :-1], (216, 72, 1)),
    "more than an eighth": (rows_of(80, 67, 3), (67, 1)),
    "rows that are not aligned": (rows_of(71, 67, 3), (67, 1)),
    "rows that are aligned when packed": (rows_of(72, 68, 3), (68, 1)),
    "expanded rows": (torch.empty(67).expand(3, 67), (67, 1)),
    "an expanded batch": (rows_of(72, 67, 3).expand(2, 3, 67), (216, 72, 1)),
    "batch and sequence swapped": (rows_of(72, 67, 3, 2).transpose(0, 1), (201, 67, 1)),
    "vocabulary first": (torch.empty(67, 72)[:, :70].T, (67, 1)),
    "overlapping rows": (torch.empty(99).as_strided((3, 67), (8, 1)), (67, 1)),
    "one row": (rows_of(72, 67, 1), (67, 1)),
    "one dimension": (torch.empty(134)[::2], (1,)),
    "no rows": (rows_of(72, 67, 0), (67, 1)),
}


@pytest.mark.parametrize(("student", "strides"), STUDENTS.values(), ids=STUDENTS)
def test_which_gradients_are_padded(student: Tensor, strides: tuple[int, ...]) -> None:
    assert gradient_strides(student) == strides
    gradient = empty_gradient(student)
    assert gradient.shape == student.shape and gradient.stride() == strides
    assert has_rows(gradient) and row_stride(gradient) == (strides[-2] if len(strides) > 1 else 67)
    assert not gradient._is_view() and gradient.data_ptr() % 16 == 0
    assert gradient_strides(gradient) == strides


def test_a_padded_gradients_memory_is_kept_too() -> None:
    student = rows_of(4112, 4099, 96)
    first = empty_gradient(student)
    address = first.data_ptr()
    del first
    again = empty_gradient(student)
    assert again.data_ptr() == address and again.stride() == (4112, 1)
    other = empty_gradient(student)
    again.fill_(1.0)
    other.fill_(2.0)
    assert (again == 1).all() and (other == 2).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_has_a_slot_of_its_own() -> None:
    kept = GRADIENT_MEMORY.take(SHAPE, torch.float32)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"1" if GRADIENT_MEMORY._kept is None else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    assert kept.shape == SHAPE
