"""The compiled PTX of the Triton kernels, executed: values, memory errors, races, bytes.

ptxsim raises on any access outside a tensor, misaligned access, data race (also between programs),
deadlock or read of uninitialised memory; so a test that returns has shown their absence on its
inputs. Rows that do not count hold NaN, and the tensors' neighbours in memory are out of bounds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kdkernels import reference
from kdkernels.problem import Options, Problem

pytest.importorskip("triton")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Outcome(NamedTuple):
    problem: Problem
    loss: Tensor
    gradient: Tensor | None
    launches: list[tuple[str, Any]]  # of (kernel, ptxsim.Stats)


@pytest.fixture
def run(ptxsim: Any) -> Any:
    from kdkernels.backends.triton import launch, policy

    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: the kernels are interpreted, not compiled")
    device = policy.H100._replace(processors=2)

    def run(
        student: Tensor, teacher: Tensor, *, split: int = 1, exchange: str = "none",
        programs: int = 2, warps: int = 4, vectors: int = 1, mode: str = "forward",
        extras: bool = False, target: int = 90, in_place: bool = False, **options: Any,
    ) -> Outcome:  # fmt: skip
        ids = options.pop("ids", None)  # of a sparse teacher, whose entries ``teacher`` is
        rows, vocab = student.shape[0], student.shape[-1]
        if ids is None:
            vocab = min(vocab, teacher.shape[-1])
        labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(3))
        labels[0], labels[1] = vocab - 1, -100
        student[1] = teacher[1] = float("nan")
        given = {"alpha": 0.5, "reduction": "sum", **options}
        problem = Problem(student, teacher, labels, None, None, Options(**given), ids)
        exact = reference.forward(problem, want_gradient=True, extras=extras)
        launches: list[tuple[str, Any]] = []
        chosen = policy.LaunchPolicy(warps, vectors, 128, 4, split, exchange, programs)
        settings = {"device": device, "launch_policy": chosen}
        with ptxsim.patch_triton(target=target, log=launches, coop=exchange == "spin"):
            result = launch.forward(
                problem, want_gradient=mode == "forward", extras=extras,
                gradient_out=student if in_place else None, **settings,
            )  # fmt: skip
            gradient = result.gradient
            if mode == "recompute":
                gradient = launch.backward(problem, result.statistics, torch.ones(()), **settings)
        torch.testing.assert_close(result.loss.double(), exact[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(
            result.statistics[:7].double(), exact[1][:7], rtol=1e-5, atol=1e-5
        )
        if gradient is not None:
            assert exact[2] is not None
            step = torch.finfo(gradient.dtype).eps
            least = 1e-7 + 2e-6 * float(exact[2].abs().max())
            torch.testing.assert_close(gradient.double(), exact[2], rtol=step, atol=least)
            assert (gradient[1] == 0).all()
        # Between programs the emulator knows no order and warns of every plain exchange; the values
        # above are the check. Where programs share nothing there is nothing to warn of.
        shared = ("partials_ptr", "student_ptr+gradient_ptr") if exchange == "spin" else ()
        for _, stats in launches:
            for warning in stats.warnings:
                text = stats.report_text(warning)
                assert warning["kind"].startswith("cross-block"), text
                assert any(name in text for name in shared), text
        return Outcome(problem, result.loss, gradient, launches)

    return run


def logits(rows: int, vocab: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocab, generator=chance)).to(dtype)


@pytest.mark.parametrize("target", (80, 90, 100))
@pytest.mark.parametrize("vocab", (1, 5, 1023, 4099))
def test_kl_and_ce_with_gradient(run: Any, vocab: int, target: int) -> None:
    """Odd vocabularies: every row starts at another place in a vector."""
    run(logits(3, vocab), logits(3, vocab, seed=1), target=target)


@pytest.mark.parametrize(
    ("divergence", "parameters", "temperature"),
    (
        ("reverse_kl", (), 1.7),
        ("jsd", (0.3,), 2.0),
        ("tvd", (), 1.0),
        ("skew_forward_kl", (0.1,), 1.0),
        ("skew_reverse_kl", (0.9,), 4.0),
        ("alpha_beta", (0.2, 0.7), 1.0),
        ("alpha_beta", (0.0, 0.6), 3.0),
    ),
)
@pytest.mark.parametrize("mode", ("forward", "recompute"))
def test_the_other_divergences(
    run: Any, divergence: str, parameters: tuple[float, ...], temperature: float, mode: str
) -> None:
    run(
        logits(3, 2051), logits(3, 2051, seed=1), mode=mode, divergence=divergence,
        parameters=parameters, temperature=temperature,
    )  # fmt: skip


@pytest.mark.parametrize("dtypes", ((F32, F32), (BF16, F32), (F16, BF16), (F32, F16)), ids=str)
def test_dtypes_and_options(run: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    run(
        logits(3, 1201, dtypes[0]), logits(3, 1201, dtypes[1], seed=1), extras=True,
        label_smoothing=0.1, z_loss=1e-3, student_softcap=20.0, teacher_softcap=15.0,
        student_scale=-0.5, teacher_scale=1.3, temperature=2.0,
    )  # fmt: skip


def test_views_of_any_alignment(run: Any) -> None:
    """A shifted start, a padded row, a column stride of 2, a longer student vocabulary."""
    run(logits(3, 1030)[:, 3:1027], logits(3, 1024, seed=1))
    run(logits(3, 1024), logits(3, 1032, seed=1)[:, :1024])
    run(logits(3, 1030)[:, ::2], logits(3, 515, seed=1))
    run(logits(3, 1030), logits(3, 1024, seed=1))


@pytest.mark.parametrize("divergence", ("forward_kl", "jsd"))
@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("exchange", ("launch", "spin"))
def test_rows_shared_by_several_programs(
    run: Any, exchange: str, in_place: bool, divergence: str
) -> None:
    """Right values; also where the gradient overwrites the student."""
    parameters = (0.3,) if divergence == "jsd" else ()
    outcome = run(
        logits(5, 5003), logits(5, 5003, seed=1), split=3, exchange=exchange, in_place=in_place,
        programs=15 if exchange == "launch" else 6, divergence=divergence, parameters=parameters,
    )  # fmt: skip
    rows = [name for name, _ in outcome.launches].count("kd_rows")
    assert rows == (1 if exchange == "spin" else 2 + (divergence == "jsd") + in_place)


@pytest.mark.parametrize(
    ("divergence", "parameters"),
    (("reverse_kl", ()), ("jsd", (0.3,)), ("tvd", ()), ("alpha_beta", (0.2, 0.7))),
)
@pytest.mark.parametrize("exchange", ("none", "launch", "spin"))
def test_the_entry_that_a_student_is_sure_of(
    run: Any, exchange: str, divergence: str, parameters: tuple[float, ...]
) -> None:
    """Compiled, that entry is recognised in every sweep by the same bits."""
    student, teacher = logits(5, 2003, F32), logits(5, 2003, F32, seed=1)
    for row in range(5):
        student[row, 401 * row] += 25
    teacher[3, 5] += 25
    outcome = run(
        student, teacher, alpha=1.0, split=1 if exchange == "none" else 2, exchange=exchange,
        programs=10 if exchange == "launch" else 4, divergence=divergence, parameters=parameters,
    )  # fmt: skip
    exact = reference.forward(outcome.problem, want_gradient=True, extras=False)[2]
    assert exact is not None and outcome.gradient is not None
    alive = torch.tensor([0, 2, 3, 4])
    error = (outcome.gradient.double() - exact)[alive].abs().amax(-1)
    assert (error < 1e-5 * exact[alive].abs().amax(-1)).all(), error


@pytest.mark.parametrize(
    ("tail", "divergence", "parameters", "count", "dtype"),
    (
        ("bucket", "forward_kl", (), 9, BF16),
        ("bucket", "jsd", (0.3,), 70, F32),
        ("uniform", "forward_kl", (), 300, F16),
        ("renormalize", "skew_reverse_kl", (0.9,), 9, F32),
        ("subset", "alpha_beta", (0.2, 0.7), 70, BF16),
        ("none", "forward_kl", (), 70, F32),
    ),
)
@pytest.mark.parametrize("mode", ("forward", "recompute", "in place"))
def test_a_sparse_teacher(
    run: Any, tail: str, divergence: str, parameters: tuple[float, ...], count: int,
    dtype: torch.dtype, mode: str,
) -> None:  # fmt: skip
    """The student is read once by each sweep; the entries are stored behind the other columns.

    One student is sure of an entry, so that what the others share is summed by themselves.
    """
    rows, vocab = 4, 1031
    student, weights = logits(rows, vocab, dtype), logits(rows, count, F32, seed=1)
    ids = torch.stack([torch.randperm(vocab)[:count] for _ in range(rows)])
    ids[:, 1] = ids[3] = -1
    student[2, ids[2, 0]] += 40
    log_probs = weights.log_softmax(-1).double() - 0.1
    outcome = run(
        student, log_probs, ids=ids, tail=tail, divergence=divergence, parameters=parameters,
        mode="recompute" if mode == "recompute" else "forward", in_place=mode == "in place",
        label_smoothing=0.1, z_loss=1e-3, temperature=2.0 if count > 9 else 1.7, extras=True,
    )  # fmt: skip
    names = [name for name, _ in outcome.launches]
    assert names.count("kd_entries") == names.count("kd_rows") == 1 + (mode == "recompute")


@pytest.mark.parametrize("seed", (1, 2, 3))
def test_waiting_programs_in_any_schedule(run: Any, ptxsim: Any, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        original = ptxsim.patch_triton
        patch.setattr(ptxsim, "patch_triton", lambda **given: original(seed=seed, **given))
        run(logits(7, 3001), logits(7, 3001, seed=1), split=2, exchange="spin", programs=4)


@pytest.mark.parametrize(("vocab", "slack"), ((16384, 0.01), (20001, 0.02)))
def test_bytes_requested_per_element(run: Any, vocab: int, slack: float) -> None:
    """Two reads of both models and one write: 10 bytes per bf16 column, whatever its alignment."""
    rows = 4
    outcome = run(logits(rows, vocab), logits(rows, vocab, seed=1), warps=8, vectors=2)
    stats = dict(outcome.launches)["kd_rows"]
    counted = (rows - 1) * vocab  # one row does not count: it is only written
    for name in ("student_ptr", "teacher_ptr"):
        assert stats.buffers[name]["load_bytes"] <= 4 * counted * (1 + slack)
        assert stats.buffers[name]["unique_read_bytes"] == 2 * counted
        # Sectors of 32 bytes: no request fetches what it does not use.
        assert 32 * stats.buffers[name]["load_sectors"] <= 4 * counted * (1 + 3 * slack + 0.01)
    assert stats.buffers["gradient_ptr"]["store_bytes"] <= 2 * rows * vocab * (1 + slack)


def test_scaling_touches_nothing_where_the_factor_is_1(ptxsim: Any) -> None:
    from kdkernels.backends.triton import launch

    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    gradient = logits(3, 1001)
    for factor in (torch.tensor(1.0), torch.tensor(2.0), torch.tensor([1.0, 0.5, 1.0])):
        want = (gradient.float() * factor.reshape(-1, 1)).to(BF16)
        launches: list[tuple[str, Any]] = []
        with ptxsim.patch_triton(target=90, log=launches):
            out = launch.scale_gradient(gradient.clone(), factor, overwrite=True)
        assert torch.equal(out, want)
        written = sum(b["store_bytes"] for b in launches[0][1].buffers.values())
        assert written == 2 * 1001 * int((factor != 1).sum()) * (3 if factor.ndim == 0 else 1)
