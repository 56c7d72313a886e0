"""The CUDA kernels in the emulator, through the real host launcher: numbers, races, bounds, bytes.

Each run raises on any access outside the tensors, any data race and any missing wait; the tests add
what the numbers have to be. See simulator.py for what only a device can prove.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import simulator
import test_matrix
import test_rows
import torch

from kdkernels import fused_topk_kd_loss, label_errors
from kdkernels.entries import TAILS
from kdkernels.problem import Options, Problem, row_scale

pytestmark = simulator.needs_simulator

each_tail = pytest.mark.parametrize("tail", TAILS)
each_case = pytest.mark.parametrize(
    "number", range(len(test_matrix.CASES)), ids=lambda n: str(test_matrix.CASES[n])
)
each_cluster = pytest.mark.parametrize("cluster", (1, 2, 4, 8, 16))
# "shifted": the register kernel with a teacher whose rows are aligned differently.
each_kernel = pytest.mark.parametrize("kernel", ("registers", "shifted", "shared", "stream"))
# Of student and teacher, those that the register kernel has.
each_pair_of_dtypes = pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes),
)


def force(monkeypatch: pytest.MonkeyPatch, kernel: str, cluster: int = 0) -> None:
    monkeypatch.setenv("KDKERNELS_CUDA_KERNEL", "registers" if kernel == "shifted" else kernel)
    if cluster:
        monkeypatch.setenv("KDKERNELS_CUDA_CLUSTER", str(cluster))


def elsewhere(logits: torch.Tensor, columns: int = 3, offset: int = 0) -> torch.Tensor:
    """The same logits with that many columns between rows, some elements into an allocation."""
    rows, vocab = logits.shape
    storage = torch.full((offset + rows * (vocab + columns),), math.nan, dtype=logits.dtype)
    view = storage[offset:].view(rows, vocab + columns)[:, :vocab]
    return view.copy_(logits)


def placed(teacher: torch.Tensor, kernel: str) -> torch.Tensor:
    return elsewhere(teacher) if kernel == "shifted" else teacher


def assert_right(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, **options: Any
) -> simulator.Recorder:
    spec = cases.Spec(options.pop("divergence", "forward_kl"), options.pop("parameters", ()))
    options = {"alpha": None, "temperature": 1.0, **options}
    standard = cases.standard(student, teacher, labels, spec, **options)
    with simulator.simulated() as recorder:
        measured = cases.evaluate(
            student, teacher, labels, backend="cuda", **options, **spec.arguments
        )
    cases.assert_accurate(measured, standard)
    return recorder


@each_case
def test_loss_and_gradient_are_as_accurate_as_eager(number: int) -> None:
    with simulator.simulated(seed=number):
        test_matrix.test_loss_and_gradient_are_as_accurate_as_eager(number, "cuda", "cpu")


@each_case
def test_every_output_equals_the_oracles(number: int) -> None:
    with simulator.simulated(seed=number):
        test_matrix.test_every_output_equals_the_oracles(number, "cuda", "cpu")


@each_cluster
@pytest.mark.parametrize("kernel", ("registers", "shared"))
@each_pair_of_dtypes
@pytest.mark.parametrize("vocab", (9, 1000, 4099))
def test_every_cluster_size(
    kernel: str,
    cluster: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    vocab: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of every alignment; more rows than the largest clusters, so that stages are reused."""
    force(monkeypatch, kernel, cluster)
    student, teacher = cases.pair((20, vocab), *dtypes, seed=vocab)
    labels = cases.labels_for((20,), vocab, seed=vocab)
    for options in ({"temperature": 2.0, "alpha": 0.3}, {"divergence": "reverse_kl"}):
        assert_right(student, teacher, labels, **options)


@each_cluster
@each_pair_of_dtypes
@pytest.mark.parametrize("vocab", (9, 1000, 4099))
def test_rows_that_are_aligned_differently(
    cluster: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    vocab: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By every number of bytes, and at the two ends of an allocation, which no copy may cross."""
    force(monkeypatch, "registers", cluster)
    student, teacher = cases.pair((20, vocab), *dtypes, seed=vocab)
    labels = cases.labels_for((20,), vocab, seed=vocab)
    for columns, offset in ((3, 0), (0, 1), (5, 7)):
        assert_right(student, elsewhere(teacher, columns, offset), labels, temperature=2.0)
    other = {"divergence": "reverse_kl", "temperature": 1.7}
    assert_right(elsewhere(student, 1, 3), teacher, labels, alpha=0.3, **other)


@each_cluster
@cases.each_name
def test_every_divergence_in_clusters(
    spec: cases.Spec, cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, "shared", cluster)
    student, teacher = cases.pair((9, 512), torch.bfloat16, torch.float32, seed=3)
    assert_right(student, teacher, None, divergence=spec.name, parameters=spec.parameters)


@pytest.mark.parametrize("vocab", (32000, 50257, 128256, 151936, 256000))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_traffic_of_real_vocabularies(vocab: int, dtype: torch.dtype) -> None:
    """Read once, written once: 3 units, and beside them at most 72 bytes a row.

    Those are 28 of statistics, 16 of the row's plan, and what 16-byte copies fetch beside unaligned
    rows.
    """
    rows, size = 2, dtype.itemsize
    student, teacher = cases.pair((rows, vocab), dtype, seed=1)
    labels = cases.labels_for((rows,), vocab, ignored=0.0)
    for temperature in (1.0, 2.0):
        recorder = assert_right(student, teacher, labels, temperature=temperature)
        (main,) = (s for s in recorder.launches if "register_kernel" in s.kernel)
        beside = rows * (4 * 7 + 16)
        for name in ("student", "teacher"):
            (read,) = (b for k, b in main.buffers.items() if k.startswith(name))
            assert read["load_bytes"] <= read["unique_read_bytes"] + rows * 32
            beside += read["unique_read_bytes"] - rows * vocab * size
        written = sum(b["store_bytes"] for b in main.buffers.values())
        assert written == rows * (vocab * size + 4 * 7), "the statistics but those of `extras`"
        assert beside <= 72 * rows
        conflicts = main.shared["bank_conflicts"] / main.shared["wavefronts"]
        assert conflicts <= 0.02
        # Few rows take more blocks, whose last warps have columns to spare, evaluated as -inf.
        places = main.grid[0] * main.block[0] * 32
        assert main.mufu / places <= 3.0
        assert main.d["local_bytes"] == 0 if "local_bytes" in main.d else True


@pytest.mark.parametrize("columns", (50257, 50304), ids=("teacher", "student"))
def test_traffic_of_rows_that_are_aligned_differently(columns: int) -> None:
    """50257 columns, of 50304 in one of the two: 3 units, and a few bytes a block."""
    rows, vocab = 4, 50257
    student, teacher = cases.pair((rows, vocab), torch.bfloat16, seed=1)
    student, teacher = (
        elsewhere(z, 47) if wide else z
        for z, wide in ((student, columns != vocab), (teacher, columns == vocab))
    )
    labels = cases.labels_for((rows,), vocab, ignored=0.0)
    recorder = assert_right(student, teacher, labels, temperature=2.0)
    (main,) = (s for s in recorder.launches if "register_kernel" in s.kernel)
    blocks = main.grid[0] // rows
    for name in ("student", "teacher"):
        (read,) = (b for k, b in main.buffers.items() if k.startswith(name))
        assert read["load_bytes"] <= rows * (2 * vocab + 32 * blocks)
    written = sum(b["store_bytes"] for b in main.buffers.values())
    assert written == rows * (2 * vocab + 4 * 7)
    assert main.shared["bank_conflicts"] / main.shared["wavefronts"] <= 0.02


@pytest.mark.parametrize(
    ("dtype", "vocab", "blocks", "threads"),
    [
        (torch.bfloat16, 128256, 8, 512),
        (torch.bfloat16, 32000, 2, 512),
        (torch.bfloat16, 50257, 4, 416),
        (torch.bfloat16, 131072, 8, 512),
        (torch.bfloat16, 151936, 8, 352),
        (torch.bfloat16, 262144, 16, 512),
        (torch.bfloat16, 262208, 16, 320),
        (torch.float32, 32000, 4, 256),
        (torch.float32, 128256, 16, 256),
    ],
    ids=str,
)
def test_launches_of_many_rows(
    dtype: torch.dtype, vocab: int, blocks: int, threads: int, tmp_path: Path
) -> None:
    """What 8192 rows take on a large device: few processors, so that stages are used again.

    In a process of its own, since a device's limits are asked for once.
    """
    tests = simulator.ROOT / "tests"
    folders = map(str, (tests, tests / "loss", tests / "simulate", simulator.ROOT))
    call = [sys.executable, "-c", "import test_cuda_simulated as t; t.run_many_rows()"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(folders),
        "PTXSIM_SMS": "16",
        "MANY_ROWS": f"{str(dtype)[6:]} {vocab} {blocks} {threads}",
    }
    done = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def run_many_rows() -> None:
    name, *numbers = os.environ["MANY_ROWS"].split()
    vocab, blocks, threads = map(int, numbers)
    rows = 5 * 16 // blocks  # of each cluster's at least five, of the largest one's all
    student, teacher = cases.pair((rows, vocab), getattr(torch, name), seed=2)
    labels = cases.labels_for((rows,), vocab)
    recorder = assert_right(student, teacher, labels, temperature=2.0)
    (main,) = (s for s in recorder.launches if "register_kernel" in s.kernel)
    assert main.block[0] == threads and main.grid[0] == 16 // blocks * blocks
    assert main.mufu / (rows * vocab) <= 3.0


@each_kernel
def test_hostile_rows(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRACT.md, section 3: rows 1 to 6."""
    force(monkeypatch, kernel)
    vocab, inf, nan = 1031, math.inf, math.nan
    student, teacher = cases.pair((9, vocab), torch.float32)
    labels = cases.labels_for((9,), vocab, ignored=0.0)
    labels[8] = -100
    teacher[0, 17] = -inf
    student[1, 900:], teacher[1, 900:] = -inf, -inf
    labels[1] = 5
    student[2, 3] = -inf  # and the teacher is not
    student[3, 7], student[4, 9], student[5] = nan, inf, -inf
    teacher[6, 4] = nan
    student[7, :1000] = -inf
    teacher[7, :1000] = -inf
    labels[7] = 1001
    student[8], teacher[8, 5], teacher[8, 6] = nan, inf, 3e38
    teacher = placed(teacher, kernel)
    options: dict[str, Any] = {"alpha": 0.4, "reduction": "none", "gradient": "forward"}
    with simulator.simulated():
        loss, gradient = cases.evaluate(student, teacher, labels, backend="cuda", **options)
    for row in (0, 1, 7):
        want = cases.oracle(
            student[row : row + 1], teacher[row : row + 1], labels[row : row + 1], **options
        )
        torch.testing.assert_close(loss[row].double(), want.loss[0], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(gradient[row].double(), want.gradient[0], rtol=1e-5, atol=1e-8)
    assert loss[2] == inf and gradient[2].isfinite().all()
    assert loss[3:7].isnan().all() and gradient[3:7].isnan().all()
    assert loss[8] == 0 and (gradient[8] == 0).all()
    assert (gradient[1, 900:] == 0).all() and (gradient[7, :1000] == 0).all()


@each_kernel
def test_a_student_that_is_its_teacher_gets_exactly_nothing(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, kernel)
    student, _ = cases.pair((4, 2003), torch.bfloat16)
    teacher = placed(student, kernel)
    for divergence in ("forward_kl", "reverse_kl"):
        with simulator.simulated():
            loss, gradient = cases.evaluate(
                student, teacher, None, backend="cuda", temperature=2.0, divergence=divergence
            )
        assert loss == 0 and (gradient == 0).all()


@each_kernel
def test_distributions_that_almost_agree_keep_their_digits(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed form cancels there; the entries are summed anew."""
    force(monkeypatch, kernel)
    student, noise = cases.pair((3, 1501))
    for divergence in ("forward_kl", "reverse_kl"):
        temperature = 3.0 if kernel in ("shared", "stream") else 2.0
        options = {"divergence": divergence, "temperature": temperature}
        teacher = placed(student + 1e-3 * noise, kernel)
        with simulator.simulated():
            loss, _ = cases.evaluate(student, teacher, None, backend="cuda", **options)
        want = cases.oracle(student, teacher, None, **options).loss
        torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=0.0)


#: Of those whose slopes are summed; the first has register kernels, too.
SLOPED = (
    cases.Spec("reverse_kl"),
    *(cases.Spec("jsd", (beta,)) for beta in (0.1, 0.5, 0.9)),
    cases.Spec("tvd"),
    *(
        cases.Spec(f"skew_{way}_kl", (beta,))
        for way in ("forward", "reverse")
        for beta in (0.1, 0.5)
    ),
    cases.Spec("alpha_beta", (0.0, 0.6)),
)


def sure_rows(dtype: torch.dtype, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's top logit 15 and 20 above the rest; the teacher sure of it, less, of another
    entry, and of none."""
    student, teacher = cases.pair((8, vocab), scale=1.0)
    for row in range(8):
        top = 15.0 if row < 4 else 20.0
        at = 97 * row % vocab
        student[row, at] = student[row].max() + top
        if row % 4 < 2:
            teacher[row, at] = teacher[row].max() + top / (1 + row % 4)
        elif row % 4 == 2:
            teacher[row, 13] = teacher[row].max() + top
    return student.to(dtype), teacher.to(dtype)


def assert_digits(
    student: torch.Tensor, teacher: torch.Tensor, spec: cases.Spec, **options: Any
) -> None:
    if spec.name == "tvd":  # the sign of q - p is undecided where both round to the same
        q, p = ((z.double() / options["temperature"]).softmax(-1) for z in (student, teacher))
        at = q.argmax(-1, keepdim=True)
        decided = (q - p).gather(-1, at).abs().squeeze(-1) > 1e-6
        student, teacher = student[decided], teacher[decided]
    options["reduction"] = "none"
    want = cases.oracle(student, teacher, None, **options, **spec.arguments).gradient
    eager = cases.plain(student, teacher, None, spec, dtype=torch.float32, **options).gradient
    # Where both are sure of one entry its gradient may be far below those it is the sum of.
    allowed = (1e-5 * want.abs().amax(-1)).maximum((eager - want).abs().amax(-1))
    allowed += torch.finfo(student.dtype).eps / 2 * want.abs().amax(-1)
    for extras in (False, True):
        leaf = student.clone().requires_grad_()
        with simulator.simulated():
            called = {"backend": "cuda", "return_outputs": extras}
            got = cases.call(leaf, teacher, None, **called, **options, **spec.arguments)
            loss = got.loss if extras else got
            (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        error = (gradient.double() - want).abs().amax(-1)
        assert (error <= allowed).all(), (str(spec), extras, error / allowed)
        if os.environ["KDKERNELS_CUDA_KERNEL"] == "registers":
            return  # extra outputs take another kernel


@each_kernel
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_gradient_of_a_sure_student_keeps_its_digits(
    kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the entry it is sure of, slope and q * (sum of slopes) are equal but for the last ones."""
    force(monkeypatch, kernel)
    student, teacher = sure_rows(dtype, 1031)
    teacher = placed(teacher, kernel)
    for spec in SLOPED if kernel in ("shared", "stream") else SLOPED[:1]:
        for temperature in (1.0, 2.0):
            assert_digits(student, teacher, spec, temperature=temperature)


@each_cluster
@pytest.mark.parametrize("kernel", ("registers", "shared"))
def test_a_sure_student_in_clusters(
    kernel: str, cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums without the sure entry, across warps and blocks."""
    force(monkeypatch, kernel, cluster)
    student, teacher = sure_rows(torch.float32, 4099)
    for spec in SLOPED[:1] if kernel == "registers" else SLOPED[:2]:
        assert_digits(student, teacher, spec, temperature=1.7)


def test_a_sure_student_where_threads_have_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "registers", 8)
    student, teacher = sure_rows(torch.bfloat16, 151_936)
    assert_digits(student[2:3], teacher[2:3], SLOPED[0], temperature=2.0)


@pytest.mark.parametrize("layout", ("odd offset", "stride 2", "shifted", "transposed", "padded"))
def test_layouts(layout: str) -> None:
    """Rows that no bulk copy can fetch, or whose two tensors are aligned differently."""
    vocab = 777
    student, teacher = cases.pair((2, 6, 2 * vocab + 9), torch.bfloat16)
    if layout == "odd offset":
        student, teacher = student[..., 3 : vocab + 3], teacher[..., 2 : vocab + 2]
    elif layout == "stride 2":
        student, teacher = student[..., : 2 * vocab : 2], teacher[..., :vocab]
    elif layout == "shifted":
        student, teacher = student[:, :-1, :vocab], teacher[:, :-1, :vocab]
    elif layout == "transposed":
        student, teacher = (
            student[..., :vocab].transpose(0, 1),
            teacher[..., :vocab].transpose(0, 1),
        )
    else:
        student = student[..., :vocab].contiguous()
        teacher = teacher[..., : vocab + 10].contiguous()[..., :vocab]
    labels = cases.labels_for(tuple(student.shape[:-1]), vocab)
    assert_right(student, teacher, labels, alpha=0.5)


@each_kernel
@pytest.mark.parametrize("vocab", (1000, 777))
def test_rows_that_meet_in_another_order(
    kernel: str, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1000 columns all rows start alike, at 777 any two may differ; the rest of both is NaN."""
    force(monkeypatch, kernel)
    student = cases.logits((3, 8, vocab), torch.bfloat16, seed=1)
    teacher = placed(cases.logits((9, vocab), torch.bfloat16, seed=2), kernel)
    pairs = torch.randperm(24, generator=cases.generator(1))[:17]
    of_teacher = torch.tensor([0, 8, *range(4), *range(5, 9), *range(4), 8, 0, 8])  # not 4
    labels = cases.labels_for((17,), vocab)
    for options in ({"reduction": "none", "labels": labels}, {"divergence": "reverse_kl"}):
        with simulator.simulated():
            test_rows.assert_as_of_copies(
                student, teacher, pairs, of_teacher, backend="cuda", gradient="recompute", **options
            )


def test_what_cannot_meet_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = label_errors("cpu").zero_()
    with simulator.simulated():
        test_rows.assert_what_cannot_meet_is_nan("cuda", monkeypatch)
    assert flag == 1 + 5
    flag.zero_()


@pytest.mark.parametrize("kernel", ("registers", "shared", "stream"))
def test_a_padded_students_gradient_is_stored_whole(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50257 of 50304 columns, in small: packed rows would move 13 bytes an element instead of 2."""
    force(monkeypatch, kernel)
    rows, vocab, columns = 8, 4099, 4112
    wide = cases.pair((rows, columns), torch.bfloat16)
    student, teacher = (z[:, :vocab] for z in wide)
    with simulator.simulated() as recorder:
        gradient = cases.evaluate(student, teacher, None, backend="cuda").gradient
    assert gradient.stride() == (columns, 1)
    buffers = [b for launch in recorder.launches for b in launch.buffers.values()]
    stored = max(buffers, key=lambda b: b["store_bytes"])
    assert stored["store_bytes"] == rows * vocab * 2
    assert 32 * stored["store_sectors"] <= 1.1 * rows * vocab * 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("per_row", (False, True))
@pytest.mark.parametrize("columns", (333, 344))
def test_stored_gradients_are_scaled_on_the_device(
    dtype: torch.dtype, per_row: bool, columns: int
) -> None:
    from kdkernels.backends import BACKENDS

    rows = cases.logits((5, columns), dtype)
    gradient, between = rows[:, :333], rows[:, 333:].clone()
    factor = torch.tensor([2.0, 1.0, 0.0, -0.5, 3.0]) if per_row else torch.tensor(0.25)
    want = (gradient.float() * (factor[:, None] if per_row else factor)).to(dtype)
    for overwrite in (False, True):
        with simulator.simulated():
            scaled = BACKENDS["cuda"].scale_gradient(gradient, factor, overwrite=overwrite)
        assert torch.equal(scaled, want) and scaled.stride() == gradient.stride()
    assert torch.equal(rows[:, 333:], between)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("factor", (0.0, math.inf, math.nan))
def test_what_is_0_in_a_stored_gradient_stays_0(dtype: torch.dtype, factor: float) -> None:
    from kdkernels.backends import BACKENDS

    gradient = cases.logits((4, 333), dtype)
    gradient[1], gradient[2, ::5] = 0.0, 0.0
    gradient[3, 7] = math.nan
    zero = (gradient == 0) | (torch.tensor(factor) == 0)
    want = (gradient.float() * factor).masked_fill(zero, 0.0).to(dtype)
    with simulator.simulated():
        scaled = BACKENDS["cuda"].scale_gradient(gradient, torch.tensor(factor), overwrite=False)
    torch.testing.assert_close(scaled, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns", (333, 344))
def test_a_factor_of_1_leaves_the_gradient_unread(columns: int) -> None:
    from kdkernels.backends import BACKENDS

    gradient = cases.logits((5, columns), torch.bfloat16)[:, :333]
    with simulator.simulated() as recorder:
        BACKENDS["cuda"].scale_gradient(gradient, torch.tensor(1.0), overwrite=True)
    (scale,) = recorder.launches
    assert sum(b["store_bytes"] for b in scale.buffers.values()) == 0
    assert max(b["unique_read_bytes"] for k, b in scale.buffers.items() if "param" not in k) <= 4


def test_the_gradient_may_take_the_students_memory() -> None:
    from kdkernels.backends import BACKENDS
    from kdkernels.problem import Options

    for rows, vocab in ((3, 2048), (80, 2048), (9, 4099), (3, 50257)):
        student, teacher = cases.pair((rows, vocab), torch.bfloat16)
        labels = cases.labels_for((rows,), vocab)
        problem = Problem(student, teacher, labels, None, None, Options(alpha=0.5))
        want = cases.oracle(student, teacher, labels, alpha=0.5)
        with simulator.simulated():
            result = BACKENDS["cuda"].forward(
                problem, want_gradient=True, extras=False, gradient_out=student
            )
        assert result.gradient is student
        torch.testing.assert_close(result.loss.double(), want.loss, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(student.double(), want.gradient, rtol=5e-3, atol=1e-7)
        assert isinstance(row_scale(problem), torch.Tensor)


def test_runs_give_the_same_bits_whatever_the_schedule() -> None:
    student, teacher = cases.pair((40, 3001), torch.bfloat16)
    labels = cases.labels_for((40,), 3001)
    results = []
    for seed in (0, 7):
        with simulator.simulated(seed=seed):
            results.append(cases.evaluate(student, teacher, labels, backend="cuda", alpha=0.5))
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(results[0].gradient, results[1].gradient)


def test_no_rows() -> None:
    student, teacher = cases.pair((0, 17))
    with simulator.simulated():
        loss, gradient = cases.evaluate(student, teacher, None, backend="cuda", reduction="sum")
    assert loss == 0 and gradient.shape == (0, 17)


def test_a_forced_kernel_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "registers")
    student, teacher = cases.pair((2, 64))
    with simulator.simulated(), pytest.raises(ValueError, match="the divergence is not a KL"):
        cases.evaluate(student, teacher, None, backend="cuda", divergence="jsd")


def entries(
    teacher: torch.Tensor, count: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's ``count`` largest probabilities a row, in disorder: ids and logarithms. Of five
    rows and more the second has holes, and the third nothing."""
    found = (teacher.double() / temperature).log_softmax(-1).topk(count)
    order = torch.rand(found.indices.shape, generator=cases.generator(count)).argsort(-1)
    log_probs, ids = (x.gather(-1, order) for x in found)
    if len(ids) >= 5:
        ids[1, ::3], log_probs[1, ::3] = -1, math.nan
        ids[2] = -5
    return ids, log_probs


def with_entries(
    student: torch.Tensor, given: tuple[torch.Tensor, torch.Tensor], *labels: Any, **options: Any
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every output, and the gradient of the losses' sum."""
    leaf = student.detach().requires_grad_()
    out = fused_topk_kd_loss(leaf, *given, *labels, return_outputs=True, **options)
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
    return [x.detach().double() for x in out if x is not None], gradient.double()


def assert_entries_right(
    student: torch.Tensor, given: tuple[torch.Tensor, torch.Tensor], *labels: Any, **options: Any
) -> simulator.Recorder:
    """Outputs as accurate as eager's but for a few ulp; of a row's gradient the worst column."""
    options = {"reduction": "none", **options}
    want, exact = with_entries(student.double(), given, *labels, backend="reference", **options)
    eager, rounded = with_entries(student.float(), given, *labels, backend="torch", **options)
    with simulator.simulated(seed=student.shape[-1]) as recorder:
        got, gradient = with_entries(student, given, *labels, backend="cuda", **options)
    for one, by, other in zip(got, want, eager, strict=True):
        finite = by.isfinite()  # reverse KL is not where the tail leaves nothing outside
        assert torch.equal(one.isfinite(), finite)
        one, by, other = one[finite], by[finite], other[finite]
        assert ((one - by).abs() <= (other - by).abs() + 1e-6 * by.abs().clamp(min=1.0)).all()
    finite = exact.isfinite().all(-1)
    gradient, exact, rounded = gradient[finite], exact[finite], rounded[finite]
    largest = exact.abs().amax(-1, keepdim=True)
    allowed = (rounded - exact).abs().amax(-1, keepdim=True) + 2e-6 * largest
    allowed = allowed + torch.finfo(student.dtype).eps / 2 * exact.abs() + 2.0**-25
    assert ((gradient - exact).abs() <= allowed).all()
    return recorder


@each_tail
@pytest.mark.parametrize("spec", cases.FEW, ids=str)
def test_a_teacher_of_entries(tail: str, spec: cases.Spec) -> None:
    if tail == "none" and spec.name != "forward_kl":
        return
    turn = TAILS.index(tail) + cases.FEW.index(spec)
    dtype, vocab, count = (
        (torch.float32, 9, 9),
        (torch.bfloat16, 264, 1),
        (torch.float16, 1031, 16),
        (torch.bfloat16, 1, 2),
    )[turn % 4]
    student, teacher = cases.pair((5, vocab), dtype, torch.float32, seed=turn)
    ids, log_probs = entries(teacher, min(count, vocab), 2.0)
    padding = (0, count - min(count, vocab))
    given = (
        torch.nn.functional.pad(ids, padding, value=-1),
        torch.nn.functional.pad(log_probs, padding, value=math.nan),
    )
    labels = cases.labels_for((5,), vocab, ignored=0.0)
    labels[0], labels[4] = ids[0, 0], -100
    called = {"tail": tail, "temperature": 2.0, "alpha": 0.6, **spec.arguments}
    assert_entries_right(student, given, labels, **called)
    called |= {"temperature": 1.7, "label_smoothing": 0.1, "z_loss": 1e-3, "logit_softcap": 30.0}
    assert_entries_right(student, given, labels, **called)


@each_tail
def test_a_student_that_is_sure_beside_entries(tail: str) -> None:
    """Of an entry, or of a column outside: one minus either has no digits left."""
    student, teacher = cases.pair((4, 515), scale=1.0)
    given = entries(teacher, 8)
    for row, above in enumerate((20.0, 60.0)):
        student[row, given[0][row, 0]] += above
        student[2 + row, teacher[2 + row].argmin()] += above
    for spec in cases.FEW if tail != "none" else cases.FEW[:1]:
        assert_entries_right(student, given, tail=tail, **spec.arguments)


@each_tail
def test_hostile_entries(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody looks at them: the row is NaN, as the oracle's is where it is let be."""
    monkeypatch.setattr("kdkernels.entries.check", lambda *_: None)
    inf, nan = math.inf, math.nan
    student, teacher = cases.pair((9, 131))
    ids, log_probs = entries(teacher, 8)
    ids[1:3] = teacher[1:3].topk(8).indices
    log_probs[1] = log_probs[0]
    ids[0, 3], ids[1, 3], ids[8, 3] = 131, 2**40, 2**32
    ids[2, 3] = ids[2, 4]
    log_probs[3, 2], log_probs[4, 2] = nan, inf
    log_probs[5] += 3.0
    student[6, 9], student[7, 9] = nan, inf
    labels = torch.arange(9) + 3
    for alpha in (0.5, 0.0):
        called = {"tail": tail, "alpha": alpha, "reduction": "none"}
        want, exact = with_entries(
            student.double(), (ids, log_probs), labels, backend="reference", **called
        )
        with simulator.simulated():
            got, gradient = with_entries(
                student, (ids, log_probs), labels, backend="cuda", **called
            )
        for one, by in zip([*got, gradient], [*want, exact], strict=True):
            torch.testing.assert_close(one, by, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_weights_of_one_column_add_up() -> None:
    ids = torch.randint(-1, 40, (6, 100), generator=cases.generator(3))
    ids[4], ids[5, 1:] = 7, -1
    weights = torch.rand(6, 100, generator=cases.generator(4)) / 50
    student = cases.logits((6, 333), torch.bfloat16)
    assert_entries_right(student, (ids, weights.log()), tail="none")


def test_entries_of_many_rows_and_layouts() -> None:
    """More rows than blocks, so that the bits of one row are gone before the next."""
    wide, teacher = cases.pair((140, 51), torch.bfloat16)
    given, labels = entries(teacher[:, :24], 9), cases.labels_for((140,), 24)
    assert_entries_right(wide[:, :24], given, labels, alpha=0.5)
    few = tuple(x[:6] for x in given)
    for student in (wide[:6, 3:27], wide[:6, 1:49:2]):
        assert_entries_right(student, few, labels[:6], alpha=0.5)
    student = wide[:6, :24].view(2, 3, 24).transpose(0, 1)
    assert_entries_right(student, tuple(x.view(3, 2, 9) for x in few))


@pytest.mark.parametrize("tail", ("bucket", "uniform"))
def test_entries_that_meet_in_another_order(tail: str) -> None:
    with simulator.simulated():
        test_rows.test_pairs_beside_a_sparse_teacher("cuda", "cpu", tail)


def test_the_gradient_beside_entries_may_take_the_students_memory() -> None:
    from kdkernels.backends import BACKENDS

    for tail in TAILS:
        student, teacher = cases.pair((9, 4099), torch.bfloat16)
        ids, log_probs = entries(teacher, 32)
        options = Options(alpha=0.5, tail=tail)
        labels = cases.labels_for((9,), 4099)
        problem = Problem(student, log_probs, labels, None, None, options, ids)
        want = BACKENDS["reference"].forward(problem, want_gradient=True, extras=False).gradient
        with simulator.simulated():
            result = BACKENDS["cuda"].forward(
                problem, want_gradient=True, extras=False, gradient_out=student
            )
        assert result.gradient is student and want is not None
        torch.testing.assert_close(student.double(), want.double(), rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("vocab", (50257, 128256))
def test_traffic_of_entries(vocab: int) -> None:
    """The student is read twice, the second time from the cache, and 64 entries once: 40 bytes of
    the row's numbers and plan, 4 of the label's logit and 18 of an entry are all that is beside."""
    rows, count = 2, 64
    student, teacher = cases.pair((rows, vocab), torch.bfloat16, torch.float32)
    labels = cases.labels_for((rows,), vocab, ignored=0.0)
    with simulator.simulated() as recorder:
        with_entries(student, entries(teacher, count), labels, backend="cuda", gradient="forward")
    (main,) = (s for s in recorder.launches if "entries_kernel" in s.kernel)
    (read,) = (b for k, b in main.buffers.items() if k.startswith("student"))
    assert read["load_bytes"] <= 2 * rows * (2 * vocab + count + 16)
    written = sum(b["store_bytes"] for b in main.buffers.values())
    assert written <= rows * (2 * (vocab + count) + 40)
