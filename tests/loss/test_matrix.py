"""Backend x divergence x dtype x shape x options: loss, gradient and outputs against float64.

The cases cover every pair of values of any two axes of ``cases.AXES``.
"""

from __future__ import annotations

import functools
import math

import cases
import pytest
import torch
from torch import Tensor

CASES = cases.all_pairs()
each_case = pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))


#: Triton's interpreter takes up to 0.3 s a row: a case of more rows is left to the other backends.
INTERPRETED_ROWS = 16


def inputs_for(number: int, backend: str, device: str) -> cases.Inputs:
    """The inputs of a case on the backend's device."""
    case = CASES[number]
    if backend == "triton" and device == "cpu" and math.prod(case.shape[:-1]) > INTERPRETED_ROWS:
        pytest.skip("triton: interpreted, so no case of many rows")
    student, teacher, labels, options = cases.inputs_of(case)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    labels = None if labels is None else labels.to(device)
    return cases.Inputs(student.to(device), teacher.to(device), labels, moved)


@functools.cache
def standard(number: int) -> cases.Standard:
    student, teacher, labels, options = cases.inputs_of(CASES[number])
    options = {k: v for k, v in options.items() if k not in ("divergence", "beta")}
    return cases.standard(student, teacher, labels, CASES[number].spec, **options)


@each_case
def test_the_oracle_equals_the_formula_written_out_in_eager_float64(number: int) -> None:
    case = CASES[number]
    student, teacher, labels, options = cases.inputs_of(case)
    student, teacher = student.double(), teacher.double()
    plain = cases.plain(student, teacher, labels, case.spec, dtype=torch.float64, **options)
    unit = cases.unit_of(student, teacher, labels, case.spec, **options)
    for what in ("loss", "gradient"):
        ours, theirs, u = (getattr(t, what) for t in (standard(number).exact, plain, unit))
        # The printed formulas cancel (mixture, powers / (a b)); 2000 eps of the terms is 4e-13.
        torch.testing.assert_close(
            ours, theirs, rtol=1e-10, atol=1e-10 * (1 + max(u.flatten().tolist(), default=0))
        )


@each_case
def test_loss_and_gradient_are_as_accurate_as_eager(number: int, backend: str, device: str) -> None:
    student, teacher, labels, options = inputs_for(number, backend, device)
    measured = cases.evaluate(student, teacher, labels, backend=backend, **options)
    assert measured.loss.dtype == (
        torch.float64 if student.dtype == torch.float64 else torch.float32
    )
    assert measured.gradient.dtype == student.dtype
    cases.assert_accurate(measured, standard(number))


@each_case
def test_every_output_equals_the_oracles(number: int, backend: str, device: str) -> None:
    student, teacher, labels, options = inputs_for(number, backend, device)
    leaf = student.requires_grad_()
    outputs = cases.call(leaf, teacher, labels, backend=backend, return_outputs=True, **options)
    student, teacher, labels, options = cases.inputs_of(CASES[number])
    truth = cases.call(
        student.double(),
        teacher.double(),
        labels,
        backend="reference",
        return_outputs=True,
        **options,
    )
    largest = max(float(t.abs().max()) for t in (student, teacher))
    per_row = 2.5 * largest / min(options["temperature"], 1.0) + math.log(student.shape[-1])
    only = {
        "loss": {},
        "kd_loss": {"alpha": 1.0, "z_loss": 0.0},
        "ce_loss": {"alpha": 0.0, "z_loss": 0.0},
        "z_loss": {"alpha": 0.0, "label_smoothing": 0.0, "no_ce": True},
    }
    # Entries that a softcap has saturated are ties in float32 and none in float64.
    tied = CASES[number].kind == "offset" and "logit_softcap" in options
    epsilon = standard(number).epsilon
    for name, ours, theirs in zip(outputs._fields, outputs, truth, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is None or (tied and name in ("agreement", "accuracy")):
            continue
        assert ours.shape == theirs.shape, name
        assert ours.requires_grad == (name == "loss"), name
        eager, unit = theirs, torch.tensor(per_row)
        if name.endswith("entropy"):  # the mean of the log-probabilities
            unit = unit * (1 + math.log(student.shape[-1]))
        if name in ("agreement", "accuracy"):
            unit = torch.tensor(1.0)
        if name in only:
            eager, unit = cases.eager_part(
                student, teacher, labels, CASES[number].spec, ours.dtype, options | only[name]
            )
        cases.assert_as_accurate(ours, eager, theirs, unit, epsilon, name)


VOCABULARIES = (1, 127, 32001, 65537, 151936, 262208)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("softcap", (None, 30.0))
def test_log_sum_exp_counts_every_entry_once(
    vocab: int, softcap: float | None, backend: str, device: str
) -> None:
    """verl#5349, unsloth#10616: a tail that is not masked adds exp(0) or exp(softcap(-inf))."""
    student, teacher = cases.pair((2, vocab), torch.bfloat16, seed=vocab, device=device)
    outputs = cases.call(
        student - 40, teacher, backend=backend, logit_softcap=softcap, return_outputs=True
    )
    for lse, z in ((outputs.label_lse, student - 40), (outputs.teacher_lse, teacher)):
        z = z.cpu().double()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        torch.testing.assert_close(lse.cpu().double(), torch.logsumexp(z, -1), rtol=5e-7, atol=5e-7)
