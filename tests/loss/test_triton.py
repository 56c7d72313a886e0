"""The Triton backend's own tests; the matrix and the contract cover it like every other backend.

What interprets kernels needs ``TRITON_INTERPRET=1`` in the environment before the first import
(``make test`` has a second run with it); what only reads policies needs nothing; ``gpu`` needs a
GPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from kdkernels import fused_kd_loss, label_errors, reference
from kdkernels.backends import BACKENDS
from kdkernels.backends.triton import policy
from kdkernels.problem import Options, Problem

BACKEND = BACKENDS["triton"]


@pytest.fixture
def launch() -> Any:
    """The launching module under Triton's interpreter."""
    module = pytest.importorskip("triton") and __import__(
        "kdkernels.backends.triton.launch", fromlist=["launch"]
    )
    if not module.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set")
    return module


def problem_of(rows: int, vocab: int, **options: Any) -> Problem:
    student, teacher = cases.pair((rows, vocab), seed=rows + vocab)
    labels = cases.labels_for((rows,), vocab, ignored=0.2, seed=vocab)
    return Problem(
        student,
        teacher,
        labels,
        None,
        None,
        Options(**{"alpha": 0.5, "reduction": "sum"} | options),
    )


def assert_equals_the_oracle(problem: Problem, loss: Tensor, gradient: Tensor) -> None:
    exact_loss, _, exact = reference.forward(problem, want_gradient=True, extras=False)
    assert exact is not None
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------- without any kernel


def test_the_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import kdkernels\n"
        "from kdkernels.backends import BACKENDS\n"
        "print(BACKENDS['triton'].unavailable())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Triton cannot be imported" in run.stdout


def test_importing_the_package_does_not_import_the_kernels() -> None:
    """(Parts of torch import Triton by themselves where it is installed.)"""
    code = (
        "import sys, kdkernels, kdkernels.commands.main\n"
        "assert 'kdkernels.backends.triton.launch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("rows", (1, 16, 64, 65, 500, 8192, 10**6))
@pytest.mark.parametrize("vocab", (1, 1000, 32000, 128256, 262208))
@pytest.mark.parametrize("heaviness", (0, 1, 2, 5))
@pytest.mark.parametrize("kind", ("cuda", "hip"))
def test_waiting_programs_are_all_resident(
    rows: int, vocab: int, heaviness: int, kind: str
) -> None:
    """A program that waits for one that is not resident would wait for ever."""
    device = policy.H100._replace(kind=kind)
    chosen = policy.choose(device, rows, vocab, 4 * vocab, 8, 2, heaviness)
    assert chosen.programs % chosen.split == 0 and chosen.programs >= 1
    if chosen.exchange == "spin":
        assert kind == "cuda" and chosen.registers is not None
        used = -(-chosen.registers // 8) * 8 * 32 * chosen.num_warps * chosen.residents
        assert used <= 65536
        assert chosen.programs <= device.processors * chosen.residents
    for one in _candidates(chosen, device, rows):
        if one.exchange == "spin":
            assert one.registers is not None
            assert one.registers * 32 * one.num_warps * one.residents <= 65536
            assert one.programs <= device.processors * one.residents


def _candidates(
    chosen: policy.LaunchPolicy, device: policy.Device, rows: int
) -> list[policy.LaunchPolicy]:
    from kdkernels.commands import tune

    found = tune.candidates(chosen, device, rows)
    assert found[0] == chosen
    return found


def test_rows_in_flight_fit_into_the_cache() -> None:
    device, row = policy.H100, 4 * 128256
    chosen = policy.choose(device, 8192, 128256, row, 8, 2, 0)
    in_flight = chosen.programs // chosen.split
    assert chosen.exchange == "spin"
    assert in_flight * row <= policy.CACHE_SHARE * device.cache_bytes
    # One sweep reads a row once: nothing has to stay.
    assert policy.choose(device, 8192, 128256, row, 8, 1, 0).split == 1


def test_a_measured_launch_is_used_and_a_broken_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tune.json"
    monkeypatch.setenv("KDKERNELS_TUNE", str(file))
    facts = (100, 32000, 128000, 8, 2, 0)
    name = policy.key(policy.H100, *facts)
    assert name == policy.key(policy.H100, 128, *facts[1:])
    measured = dataclasses.replace(policy.choose(policy.H100, *facts), num_warps=4, residents=8)
    try:
        for text, found in (
            (json.dumps({name: {"policy": dataclasses.asdict(measured)}}), measured.num_warps),
            ("{", None),
        ):
            file.write_text(text)
            policy.all_tuned.cache_clear()
            one = policy.tuned(policy.H100, 100, name)
            assert (one and one.num_warps) == found
            assert policy.tuned(policy.H100, 100, name + "?") is None
    finally:
        policy.all_tuned.cache_clear()


def test_a_compiled_kernel_is_reused_only_for_arguments_it_was_compiled_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dtype, alignment, the width of an integer, constants and options; not values or addresses."""
    pytest.importorskip("triton")
    from kdkernels.backends.triton import launch

    launched: list[tuple[str, Any]] = []

    def triton_launches(function: Any, grid: Any) -> Any:
        def start(*arguments: Any, enable_fp_fusion: bool, **options: Any) -> Any:
            launched.append(("compiled", (grid, arguments)))
            return Kernel()

        return start

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments: launched.append(("reused", (grid, arguments)))

    class OnGpu(SimpleNamespace):
        is_cuda, device, dtype, address = True, SimpleNamespace(index=0), torch.float32, 512

        def data_ptr(self) -> int:
            return self.address

    function = type("Function", (), {"__name__": "kd", "__getitem__": triton_launches})()
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_REUSES", True)

    def start(
        tensor: Any = None, number: int = 5, constant: int = 1, warps: int = 8, other: Any = None,
    ) -> str:  # fmt: skip
        tensors = (tensor or OnGpu(), other)
        launch._start(function, (3,), tensors, (number,), (0.5,), (constant,), num_warps=warps)
        kind, (grid, arguments) = launched[-1]
        assert grid == ((3,) if kind == "compiled" else (3, 1, 1))
        assert arguments == (*tensors, number, 0.5, constant)
        return kind

    assert start() == "compiled"
    assert start() == start(OnGpu(address=1024)) == start(number=2**31 - 1) == "reused"
    for change in (
        {"tensor": OnGpu(address=520)}, {"tensor": OnGpu(dtype=torch.float16)},
        {"tensor": OnGpu(device=SimpleNamespace(index=1))}, {"number": 2**31}, {"constant": 2},
        {"warps": 4}, {"other": OnGpu()},
    ):  # fmt: skip
        assert start(**change) == "compiled", change
        assert start(**change) == "reused", change
    assert start(OnGpu(is_cuda=False)) == start(OnGpu(is_cuda=False)) == "compiled"


def test_the_row_kernel_takes_the_named_fields_in_their_order() -> None:
    """The launch hands them over by position, and what is not a size may be specialised."""
    pytest.importorskip("triton")
    from kdkernels.backends.triton import row
    from kdkernels.backends.triton.arguments import Numbers, Sizes, Tensors

    tensors = [f"{name}_ptr" for name in Tensors._fields]
    assert list(row.kd_rows.arg_names) == [*tensors, *Sizes._fields, *Numbers._fields, "P"]


def test_tune_says_why_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    from kdkernels.commands.main import main

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune"]) == 1
    assert "nothing to measure" in capsys.readouterr().out


# ------------------------------------------------------------------------------- interpreted


def test_what_it_refuses_is_named(launch: Any) -> None:
    z = torch.zeros(2, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="student's logits are float64"):
        fused_kd_loss(z, z, backend="triton")


def test_reasons_on_the_cpu_without_the_interpreter() -> None:
    code = (
        "import torch\nfrom kdkernels.backends import BACKENDS\n"
        "print(torch.cuda.is_available(), BACKENDS['triton'].unavailable())\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.startswith("True") or "TRITON_INTERPRET=1" in run.stdout, run.stdout


@cases.each_spec
def test_functors_equal_the_formulas_entry_by_entry(launch: Any, spec: cases.Spec) -> None:
    """Also where one or both probabilities are 0."""
    from triton_entries import entries

    from kdkernels.backends.triton import functors

    divergence = spec.object
    log_p = -4 * torch.rand(256, dtype=torch.float64) ** 2 * 5
    log_q = torch.where(torch.rand(256) < 0.2, log_p, -4 * torch.rand(256, dtype=torch.float64) * 3)
    log_q[200:230] = log_p[200:230] + 1e-3
    log_p[:8] = -torch.inf
    log_q[4:12] = -torch.inf
    log_p, log_q = log_p.float().double(), log_q.float().double()
    case = "none"
    if divergence.name == "alpha_beta":
        case = functors.alpha_beta_case(*divergence.parameters)
    constants = SimpleNamespace(
        divergence=divergence.name, case=case, nvidia=False
    )  # fmt: skip
    value, slope = torch.zeros(256), torch.zeros(256)
    ln2 = torch.log(torch.tensor(2.0, dtype=torch.float64))
    base2 = [(x / ln2).float() for x in (log_p, log_q)]
    first, second = (*divergence.parameters, 0.0, 0.0)[:2]
    entries[(1,)](*base2, value, slope, first, second, P=constants)
    rounded = [x.double() * ln2 for x in base2]
    for ours, exact in (
        (value, divergence.value(*rounded)), (slope, divergence.slope(*rounded))
    ):  # fmt: skip
        finite = exact.isfinite()
        torch.testing.assert_close(ours.double()[finite], exact[finite], rtol=2e-5, atol=5e-7)
        assert (ours[~finite] == exact[~finite].float()).all() or exact[~finite].isnan().all()


@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jsd"))
@pytest.mark.parametrize("split", (2, 3, 7))
def test_a_row_split_over_launches_is_the_same_row(
    launch: Any, split: int, divergence: str
) -> None:
    parameters = (0.3,) if divergence == "jsd" else ()
    problem = problem_of(3, 1501, divergence=divergence, parameters=parameters, temperature=1.7)
    chosen = policy.LaunchPolicy(1, 1, None, 1, split, "launch", 3 * split)
    result = launch.forward(problem, want_gradient=True, extras=True, launch_policy=chosen)
    assert_equals_the_oracle(problem, result.loss, result.gradient)
    again = launch.backward(problem, result.statistics, torch.ones(()), launch_policy=chosen)
    assert torch.equal(again, result.gradient)
    loss = launch.forward(problem, want_gradient=False, extras=False, launch_policy=chosen).loss
    assert torch.equal(loss, result.loss)


def sure_rows(vocab: int, divergence: str, parameters: tuple[float, ...]) -> Problem:
    """The student is sure of the first, the last and another entry; so is the teacher of that one,
    of another or of none."""
    student, teacher = cases.pair((9, vocab), seed=vocab, scale=1.0)
    for row in range(9):
        at = (0, vocab - 1, vocab // 3)[row // 3]
        student[row, at] += 20
        if row % 3:
            teacher[row, (at + row % 3 - 1) % vocab] += 20
    options = Options(divergence=divergence, parameters=parameters, reduction="sum")
    return Problem(student, teacher, None, None, None, options)


@pytest.mark.parametrize("split", (1, 3))
@pytest.mark.parametrize(
    ("divergence", "parameters"),
    (("reverse_kl", ()), ("jsd", (0.5,)), ("tvd", ()), ("skew_forward_kl", (0.1,)),
     ("skew_reverse_kl", (0.9,)), ("alpha_beta", (0.2, 0.7)), ("alpha_beta", (0.0, 0.6))),
)  # fmt: skip
def test_the_entry_that_a_student_is_sure_of_keeps_its_digits(
    launch: Any, divergence: str, parameters: tuple[float, ...], split: int
) -> None:
    """In whatever slice and tile it stands; the gradient there is of the order of 1 - q."""
    problem = sure_rows(1501, divergence, parameters)
    exchange = "launch" if split > 1 else "none"
    chosen = policy.LaunchPolicy(1, 1, None, 1, split, exchange, 9 * split if split > 1 else 2)
    result = launch.forward(problem, want_gradient=True, extras=False, launch_policy=chosen)
    exact = reference.forward(problem, want_gradient=True, extras=False)[2]
    assert exact is not None
    error = (result.gradient.double() - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert (error < 1e-5).all(), error
    again = launch.backward(problem, result.statistics, torch.ones(()), launch_policy=chosen)
    assert torch.equal(again, result.gradient)


@pytest.mark.parametrize("sure", (0.0, 20.0))
@pytest.mark.parametrize(
    ("divergence", "parameters"),
    (("reverse_kl", ()), ("jsd", (0.3,)), ("tvd", ()), ("skew_forward_kl", (0.3,)),
     ("skew_reverse_kl", (0.3,)), ("alpha_beta", (0.2, 0.7))),
)  # fmt: skip
@pytest.mark.parametrize("split", (1, 3))
def test_a_student_that_equals_its_teacher_has_no_gradient_at_all(
    launch: Any, divergence: str, parameters: tuple[float, ...], split: int, sure: float
) -> None:
    student = cases.logits((4, 1501), seed=3)
    student[:, 7] += sure
    options = Options(divergence=divergence, parameters=parameters, reduction="sum")
    problem = Problem(student, student.clone(), None, None, None, options)
    exchange = "launch" if split > 1 else "none"
    chosen = policy.LaunchPolicy(1, 1, None, 1, split, exchange, 4 * split if split > 1 else 2)
    result = launch.forward(problem, want_gradient=True, extras=False, launch_policy=chosen)
    assert (result.gradient == 0).all() and float(result.loss) == 0


@pytest.mark.parametrize("excluded", (-1e9, -torch.inf))
def test_a_teacher_that_excludes_the_largest_entry_takes_no_digits(
    launch: Any, excluded: float
) -> None:
    """Of the reverse KL of a student that is not sure of that entry, or gives it no mass at all."""
    student, teacher = cases.pair((2, 1501), seed=5)
    student[1] -= 1e4
    student[1, 700:] += 1e4
    student[0, 3], student[1, 3] = float(student[0].max()) + 1e-3, -9e3
    teacher[:, 3] = excluded
    if excluded == -torch.inf:
        student[0] = student[1]
    options = Options(divergence="reverse_kl", reduction="none")
    problem = Problem(student, teacher, None, None, None, options)
    chosen = policy.LaunchPolicy(1, 1, None, 1, 1, "none", 1)
    result = launch.forward(problem, want_gradient=True, extras=False, launch_policy=chosen)
    exact_loss, _, exact = reference.forward(problem, want_gradient=True, extras=False)
    assert exact is not None
    torch.testing.assert_close(result.loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    top = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(result.gradient.double() / top, exact / top, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("offset", range(9))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_alignment_of_a_row(launch: Any, offset: int, dtype: torch.dtype) -> None:
    """Neither side of a row's columns is touched: the neighbours hold NaN."""
    student, teacher = (torch.full((2, 160), float("nan")) for _ in range(2))
    student[:, offset : offset + 130], teacher[:, 3:133] = cases.pair((2, 130), seed=offset)
    student, teacher = student.to(dtype)[:, offset : offset + 130], teacher.to(dtype)[:, 3:133]
    problem = Problem(student, teacher, None, None, None, Options(reduction="sum"))
    result = launch.forward(problem, want_gradient=True, extras=False)
    exact_loss, _, exact = reference.forward(problem, want_gradient=True, extras=False)
    torch.testing.assert_close(result.loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(result.gradient.double(), exact, rtol=ulp, atol=1e-6)


def test_a_label_outside_the_vocabulary_is_flagged_and_never_read(launch: Any) -> None:
    """What a GPU does, where looking at the labels would synchronise."""
    problem = problem_of(6, 130, reduction="none")
    assert problem.labels is not None
    problem.labels[:] = torch.tensor([3, -5, 129, 2**40, 130, -100])
    label_errors(problem.student.device).zero_()
    result = launch.forward(problem, want_gradient=True, extras=True)
    bad = torch.tensor([False, True, False, True, True, False])
    assert torch.equal(result.loss.isnan(), bad)
    assert torch.equal(result.gradient.isnan().all(-1), bad)
    assert (result.gradient[5] == 0).all()
    assert int(label_errors(problem.student.device)) == 1 + 4
    problem.labels[bad] = -100
    good = launch.forward(problem, want_gradient=True, extras=True)
    assert torch.equal(good.loss[~bad], result.loss[~bad])
    assert torch.equal(good.gradient[~bad], result.gradient[~bad])
    label_errors(problem.student.device).zero_()


@pytest.mark.parametrize("split", (1, 3))
def test_the_gradient_may_overwrite_the_student(launch: Any, split: int) -> None:
    problem = problem_of(4, 777, divergence="jsd", parameters=(0.5,))
    exchange = "launch" if split > 1 else "none"
    chosen = policy.LaunchPolicy(1, 1, None, 1, split, exchange, 4 * split if split > 1 else 2)
    want = launch.forward(problem, want_gradient=True, extras=False, launch_policy=chosen)
    own = dataclasses.replace(problem, student=problem.student.clone())
    result = launch.forward(
        own, want_gradient=True, extras=False, gradient_out=own.student, launch_policy=chosen
    )
    assert result.gradient is own.student
    assert torch.equal(result.gradient, want.gradient) and torch.equal(result.loss, want.loss)


@pytest.mark.parametrize("overwrite", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_scaling(launch: Any, dtype: torch.dtype, overwrite: bool) -> None:
    gradient = torch.randn(5, 3000).to(dtype)
    for factor in (
        torch.tensor(2.5), torch.tensor(1.0), torch.rand(10)[::2], torch.tensor(3.0).expand(5),
        torch.tensor([1.0, 0.0, float("nan"), -2.0, 1.0]),
    ):  # fmt: skip
        want = (gradient.float() * factor.reshape(-1, 1)).to(dtype)
        given = gradient.clone()
        out = BACKEND.scale_gradient(given, factor, overwrite=overwrite)
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
        assert (out is given) == overwrite
        assert overwrite or torch.equal(given, gradient)


# ----------------------------------------------------------------- interpreted: sparse teachers

TAILS = ("bucket", "uniform", "renormalize", "subset", "none")


def sparse_problem(
    rows: int, vocab: int, count: int, tail: str, *, dtype: torch.dtype = torch.float32,
    scale: float = 3.0, empty: float = 0.2, **options: Any,
) -> Problem:  # fmt: skip
    """Rows of which one does not count; with ``empty`` slots the last has no entry at all."""
    chance = cases.generator(rows + vocab + count)
    student = cases.logits((rows, vocab), seed=vocab, scale=scale).to(dtype)
    ids = torch.stack([torch.randperm(vocab + count, generator=chance) for _ in range(rows)])
    ids = torch.stack([row[row < vocab] for row in ids])[:, :count]
    ids = torch.nn.functional.pad(ids, (0, count - ids.shape[1]), value=-1)
    weights = torch.rand(ids.shape, generator=chance, dtype=torch.float64) ** 3 + 1e-4
    if empty:
        ids = ids.masked_fill(torch.rand(ids.shape, generator=chance) < empty, -1)
        ids[-1] = -1
    weights = weights * (ids >= 0)
    # Less than 1 where there are others to have the rest.
    mass = 0.9 if count < vocab else 1.0
    log_probs = (mass * weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)).log()
    labels = torch.randint(vocab, (rows,), generator=chance)
    labels[0] = torch.where(ids[0] < 0, labels[0], ids[0])[0]  # one of the entries
    if rows > 2:
        labels[1] = -100
        student[1] = float("nan")
    given = {"alpha": 0.5, "reduction": "sum", "tail": tail} | options
    return Problem(student, log_probs, labels, None, None, Options(**given), ids)


def assert_sparse_equals_the_oracle(
    launch: Any, problem: Problem, extras: bool = True, once: bool = False
) -> None:
    """Also of a gradient that is computed anew, and in the student's memory, unless ``once``."""
    exact_loss, exact_seen, exact = reference.forward(problem, want_gradient=True, extras=extras)
    assert exact is not None
    result = launch.forward(problem, want_gradient=True, extras=extras)
    torch.testing.assert_close(result.loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    seen = result.statistics[: len(exact_seen)].double()
    if not extras:
        exact_seen, seen = exact_seen[:1], seen[:1]
    torch.testing.assert_close(seen, exact_seen, rtol=2e-6, atol=2e-6)
    # Of every row relative to its own largest, before the gradient's dtype rounds it.
    top = exact.abs().amax(-1, keepdim=True).clamp(min=1e-20)
    ulp = torch.finfo(problem.student.dtype).eps
    torch.testing.assert_close(
        result.gradient.double() / top, exact / top, rtol=max(ulp, 1e-5), atol=2e-6
    )
    if once:
        return
    again = launch.backward(problem, result.statistics, torch.ones(()))
    assert torch.equal(again, result.gradient)
    own = dataclasses.replace(problem, student=problem.student.clone())
    there = launch.forward(own, want_gradient=True, extras=False, gradient_out=own.student)
    assert torch.equal(there.gradient, result.gradient) and torch.equal(there.loss, result.loss)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("vocab", "count", "dtype"),
    ((1, 1, torch.float32), (2, 1, torch.float32), (10, 17, torch.float16),
     (333, 20, torch.bfloat16)),
    ids=str,
)  # fmt: skip
def test_a_sparse_teacher_of_every_tail(
    launch: Any, vocab: int, count: int, dtype: torch.dtype, tail: str
) -> None:
    """One column, one entry, more slots than columns, rows without entries; every option."""
    empty = 0.2 if count > 1 else 0.0
    problem = sparse_problem(
        4, vocab, count, tail, dtype=dtype, empty=empty, label_smoothing=0.1, z_loss=1e-2,
        student_softcap=8.0, student_scale=-0.7, temperature=1.7 if count == 20 else 2.0,
    )  # fmt: skip
    assert_sparse_equals_the_oracle(launch, problem)


@pytest.mark.parametrize(("vocab", "dtype"), ((131, torch.float32), (256, torch.bfloat16)), ids=str)
def test_rows_that_meet_in_another_order(launch: Any, vocab: int, dtype: torch.dtype) -> None:
    """Any of the teacher's, in rows that start alike and in such that do not; others hold NaN."""
    student, teacher = (
        cases.logits((2, 3, vocab), dtype),
        cases.logits((3, 3, vocab), dtype, seed=1),
    )
    teacher = teacher[:, 1:]
    teacher[1, 0] = math.nan
    labels = torch.tensor([[3, -100, 130], [0, 7, -100]])
    index = torch.tensor([[5, 2, 0], [5, 3, 0]])
    options = Options(alpha=0.5, reduction="sum")
    problem = Problem(student, teacher, labels, None, None, options, teacher_rows=index)
    result = launch.forward(problem, want_gradient=True, extras=False)
    exact_loss, _, exact = reference.forward(problem, want_gradient=True, extras=False)
    assert exact is not None
    torch.testing.assert_close(result.loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(result.gradient.double(), exact, rtol=max(ulp, 1e-4), atol=1e-6)
    again = launch.backward(problem, result.statistics, torch.ones(()))
    assert torch.equal(again, result.gradient)


def test_entries_that_meet_in_another_order(launch: Any) -> None:
    problem = sparse_problem(5, 131, 7, "bucket")
    mapped = dataclasses.replace(problem, teacher_rows=torch.tensor([3, 1, 0, 3, 2]))
    assert_sparse_equals_the_oracle(launch, mapped, once=True)


@cases.each_spec
def test_a_sparse_teacher_and_every_divergence(launch: Any, spec: cases.Spec) -> None:
    divergence = spec.object
    for tail in ("bucket", "subset"):
        problem = sparse_problem(
            3, 131, 7, tail, divergence=divergence.name, parameters=divergence.parameters
        )
        assert_sparse_equals_the_oracle(launch, problem, extras=False, once=True)


@pytest.mark.parametrize(
    ("tail", "divergence", "parameters"),
    (*((tail, "forward_kl", ()) for tail in TAILS), ("bucket", "reverse_kl", ()),
     ("bucket", "jsd", (0.3,)), ("bucket", "alpha_beta", (0.2, 0.7)),
     ("renormalize", "jsd", (0.3,)), ("renormalize", "tvd", ())),
)  # fmt: skip
def test_a_student_that_is_sure_keeps_its_digits_beside_a_sparse_teacher(
    launch: Any, tail: str, divergence: str, parameters: tuple[float, ...]
) -> None:
    """Of an entry, of several, or of a column that is none: the others have nothing, or all."""
    problem = sparse_problem(
        8, 501, 9, tail, scale=1.0, empty=0.0, alpha=1.0, divergence=divergence,
        parameters=parameters,
    )  # fmt: skip
    student, ids = problem.student, problem.teacher_ids
    assert ids is not None
    for row, sure in ((0, 20.0), (2, 100.0)):
        student[row, ids[row, row]] += sure
    for row, sure in ((3, 20.0), (4, 100.0)):
        # What the entries have spans as many orders of magnitude as the others are below them.
        student[row, ids[row]] += torch.linspace(sure, 1.0, 9)
    student[5, ids[5]] += 100
    for row, sure in ((6, 20.0), (7, 100.0)):
        student[row, next(v for v in range(501) if v not in ids[row])] += sure
    assert_sparse_equals_the_oracle(launch, problem, extras=False, once=True)


def test_a_divergence_that_is_only_reported_leaves_the_gradient_alone(launch: Any) -> None:
    """Where a student is sure of an entry, whose column is then a column like any other."""
    problem = sparse_problem(3, 201, 5, "bucket", empty=0.0, alpha=0.0, z_loss=1e-3)
    assert problem.teacher_ids is not None
    problem.student[0, problem.teacher_ids[0, 2]] += 100
    assert_sparse_equals_the_oracle(launch, problem)


def test_what_the_entries_leave_to_the_others_is_summed_by_itself(launch: Any) -> None:
    """Five digits of it at least; 1 minus the entries' probabilities would have lost them all."""
    problem = sparse_problem(5, 3001, 33, "bucket", scale=1.0, empty=0.0, alpha=1.0)
    index = problem.teacher_ids
    assert index is not None
    is_other = torch.ones(5, 3001, dtype=torch.bool).scatter_(1, index, False)
    shares = {0: 1e-4, 2: 1e-6, 3: 1e-8, 4: 1e-10}
    for row, share in shares.items():
        student = problem.student[row].double()
        falling = torch.linspace(0, -20, 33, dtype=torch.float64)
        level = student[is_other[row]].logsumexp(0) - falling.logsumexp(0) - math.log(share)
        problem.student[row, index[row]] = (falling + level).float()
    exact = reference.forward(problem, want_gradient=True, extras=False)[2]
    assert exact is not None
    gradient = launch.forward(problem, want_gradient=True, extras=False).gradient.double()
    for row in shares:
        at = is_other[row]
        torch.testing.assert_close(gradient[row, at], exact[row, at], rtol=2e-5, atol=0)


@pytest.mark.parametrize("tail", ("bucket", "none"))
def test_the_others_may_be_excluded_or_out_of_reach(launch: Any, tail: str) -> None:
    """Their logits -inf or -1e9, and entries that the student excludes: no loop without an end."""
    problem = sparse_problem(4, 200, 6, tail, empty=0.0, divergence="forward_kl", alpha=1.0)
    assert problem.teacher_ids is not None
    for row, value in ((0, -1e9), (2, -torch.inf)):
        kept = problem.student[row, problem.teacher_ids[row]]
        problem.student[row] = value
        problem.student[row, problem.teacher_ids[row]] = kept
    problem.student[3, problem.teacher_ids[3, :2]] = -torch.inf
    exact = reference.forward(problem, want_gradient=False, extras=False)[1]
    result = launch.forward(problem, want_gradient=True, extras=False)
    torch.testing.assert_close(result.statistics[0].double(), exact[0], rtol=1e-6, atol=1e-6)


def test_ids_that_a_tail_does_not_allow_make_their_row_nan(launch: Any) -> None:
    """What a GPU does, where looking at the ids would synchronise; nothing is read or written
    there."""
    problem = sparse_problem(7, 130, 5, "bucket", empty=0.0, reduction="none")
    ids = problem.teacher_ids
    assert ids is not None
    ids[0, 1], ids[2, 3], ids[3, 4], ids[4, 0] = 130, ids[2, 0], 2**40, -(2**40)
    problem.teacher[5, 0], problem.teacher[6, 2] = 1.0, float("nan")
    result = launch.forward(problem, want_gradient=True, extras=True)
    bad = torch.tensor([True, False, True, True, False, True, True])
    assert torch.equal(result.loss.isnan(), bad)
    assert torch.equal(result.gradient.isnan().all(-1), bad)
    assert torch.equal(result.gradient.isnan().any(-1), bad)
    assert torch.equal(result.statistics[5].isnan(), bad)
    assert (result.gradient[1] == 0).all()
    with pytest.raises(IndexError, match="130 at row 0"):
        BACKEND.forward(problem, want_gradient=False, extras=False)


def test_weights_of_one_id_add_up(launch: Any) -> None:
    problem = sparse_problem(3, 130, 20, "none", alpha=1.0)
    assert problem.teacher_ids is not None
    problem.teacher_ids[:, 5:9] = problem.teacher_ids[:, 1:2]
    problem.teacher[:, 5:9] = -1.0
    assert_sparse_equals_the_oracle(launch, problem)


def test_what_it_refuses_of_a_sparse_teacher_is_named(launch: Any) -> None:
    for tail, divergence, parameters, reason in (
        ("uniform", "jsd", (0.5,), "tail='uniform'"),
        ("renormalize", "alpha_beta", (0.2, 0.7), "alpha_beta"),
    ):
        problem = sparse_problem(
            3, 30, 4, tail, divergence=divergence, parameters=parameters, alpha=1.0
        )
        assert [why for why in BACKEND.why_not(problem) if reason in why]
    assert BACKEND.why_not(sparse_problem(3, 1100, 1025, "bucket"))
    assert not BACKEND.why_not(sparse_problem(3, 1100, 1024, "bucket"))
    exact = sparse_problem(3, 30, 4, "renormalize", divergence="alpha_beta", parameters=(0.3, 0.7))
    assert not BACKEND.why_not(exact)
    assert_sparse_equals_the_oracle(launch, exact)


# ------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (3, 100, 4096))
@pytest.mark.parametrize("vocab", (50257, 128256))
@pytest.mark.parametrize("divergence", ("forward_kl", "jsd"))
def test_every_exchange_at_real_sizes(rows: int, vocab: int, divergence: str) -> None:
    """Against the portable backend on the same GPU; the same bits twice."""
    student, teacher = (
        (3 * torch.randn(rows, vocab, device="cuda")).to(torch.bfloat16) for _ in range(2)
    )
    labels = torch.randint(vocab, (rows,), device="cuda")
    runs = [
        cases.evaluate(student, teacher, labels, backend=name, divergence=divergence)
        for name in ("triton", "triton", "torch")
    ]
    assert torch.equal(runs[0].loss, runs[1].loss)
    assert torch.equal(runs[0].gradient, runs[1].gradient)
    torch.testing.assert_close(runs[0].loss, runs[2].loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(runs[0].gradient, runs[2].gradient, rtol=0.02, atol=1e-8)


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31_on_a_gpu() -> None:
    rows, vocab = 17000, 131072  # 2.2e9 logits, 4.5 GB
    base = torch.randn(1, vocab, device="cuda").to(torch.bfloat16)
    student = base.repeat(rows, 1)
    teacher = (base + 1).expand(rows, vocab)
    gradient = cases.evaluate(student, teacher, backend="triton", reduction="sum").gradient
    assert torch.equal(gradient[-1], gradient[0])


@pytest.mark.gpu
def test_graph_capture_and_another_stream() -> None:
    student, teacher = (torch.randn(256, 32000, device="cuda") for _ in range(2))
    labels = torch.randint(32000, (256,), device="cuda")
    leaf = student.requires_grad_()
    want = cases.evaluate(student, teacher, labels, backend="triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fused_kd_loss(leaf, teacher, labels, backend="triton").backward()
    torch.cuda.current_stream().wait_stream(side)
    leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fused_kd_loss(leaf, teacher, labels, backend="triton")
        loss.backward()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, want.loss) and torch.equal(leaf.grad, want.gradient)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_the_other_device() -> None:
    student, teacher = (torch.randn(70, 5000, device="cuda:1") for _ in range(2))
    with torch.cuda.device(0):
        measured = cases.evaluate(student, teacher, backend="triton")
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(
        measured.gradient, cases.evaluate(student, teacher, backend="torch").gradient
    )
