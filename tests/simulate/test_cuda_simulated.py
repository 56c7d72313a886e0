"""The CUDA kernels in the emulator, through the real host launcher: numbers, races, bounds, traffic.

Each run raises on any access outside the tensors, any data race and any missing wait; the tests add
what the numbers have to be. See simulator.py for what only a device can prove.
"""

from __future__ import annotations

import pytest
import torch

import cases
import simulator
import test_matrix

each_case = pytest.mark.parametrize(
    "number", range(len(test_matrix.CASES)), ids=lambda n: str(test_matrix.CASES[n])
)


@each_case
def test_loss_and_gradient_are_as_accurate_as_eager(number: int) -> None:
    student, teacher, labels, options = cases.inputs_of(test_matrix.CASES[number])
    with simulator.simulated(seed=number):
        measured = cases.evaluate(student, teacher, labels, backend="cuda", **options)
    assert measured.loss.dtype == torch.float32
    assert measured.gradient.dtype == student.dtype
    test_matrix.assert_accurate(measured, number)


@each_case
def test_every_output_equals_the_oracles(number: int) -> None:
    with simulator.simulated(seed=number):
        test_matrix.test_every_output_equals_the_oracles(number, "cuda", "cpu")
