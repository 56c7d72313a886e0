"""Row maps: pairs of rows have the loss of copies, and the gradient at the student's own rows."""

from __future__ import annotations

import math
from typing import Any

import cases
import pytest
import torch
from cases import evaluate, logits
from test_contract import close
from torch import Tensor

import kdkernels
from kdkernels import KDLoss, fused_kd_loss, fused_linear_kd_loss, fused_topk_kd_loss, rows

#: Of a student [3, 4, V]: neither sorted nor all.
STUDENT_ROWS = torch.tensor([7, 0, 11, 3, 4])
#: Of a teacher of 6 rows; some come several times.
TEACHER_ROWS = torch.tensor([5, 2, 2, 0, 2])
LABELS = torch.tensor([1, -100, 8, 3, 0])
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, -3.0, 0.0])

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "labels": {"labels": LABELS, "temperature": 2.0, "alpha": 0.3},
    "weights": {"labels": LABELS, "token_weights": WEIGHTS, "reduction": "none"},
    "cross-entropy alone": {"labels": LABELS, "alpha": 0.0, "z_loss": 0.01},
    "swept": {"divergence": "jsd", "labels": LABELS, "label_smoothing": 0.1},
    "capped": {"logit_softcap": 5.0, "logit_scale": (0.5, 2.0), "reduction": "sum"},
    "items": {"labels": LABELS, "num_items": torch.tensor(7.0), "temperature": 1.7},
    "ignored by another number": {"labels": LABELS.clamp(min=-1), "ignore_index": -1},
    "one column": {"vocab": 1, "labels": LABELS * 0},
    "shorter": {"teacher_vocab": 30, "vocab_policy": "truncate", "labels": LABELS},
}


def rows_of(tensor: Tensor, index: Tensor | None) -> Tensor:
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if index is None else flat[index]


def without_others(tensor: Tensor, index: Tensor | None) -> Tensor:
    """NaN in every row that no pair names."""
    others = torch.ones(tensor.shape[:-1], dtype=torch.bool).reshape(-1)
    if index is not None:
        others[index] = False
        tensor.reshape(-1, tensor.shape[-1])[others] = math.nan
    return tensor


def assert_as_of_copies(
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor | None,
    teacher_rows: Tensor | None,
    device: str = "cpu",
    **options: Any,
) -> None:
    """Loss and gradient, beside the oracle's of copies; what no pair names is not read."""
    labels = options.pop("labels", None)
    per_row = options.get("reduction") == "none"
    pairs = next(len(index) for index in (student_rows, teacher_rows) if index is not None)
    by_pair = logits((pairs,), seed=9) if per_row else None
    backend, gradient = options.pop("backend"), options.pop("gradient")
    exact = cases.oracle(
        rows_of(student, student_rows),
        rows_of(teacher, teacher_rows),
        labels,
        grad_output=None if by_pair is None else by_pair.double(),
        **options,
    )
    there = {
        name: one.to(device) if isinstance(one, Tensor) else one
        for name, one in (
            options | {"labels": labels, "student_rows": student_rows, "teacher_rows": teacher_rows}
        ).items()
    }
    measured = evaluate(
        without_others(student, student_rows).to(device),
        without_others(teacher, teacher_rows).to(device),
        backend=backend,
        gradient=gradient,
        grad_output=None if by_pair is None else by_pair.to(device, exact_dtype(student)),
        **there,
    )
    close(measured.loss, exact.loss)
    assert measured.gradient.shape == student.shape and measured.gradient.dtype == student.dtype
    want = torch.zeros(math.prod(student.shape[:-1]), student.shape[-1], dtype=torch.float64)
    want[slice(None) if student_rows is None else student_rows] = exact.gradient
    close(measured.gradient, want.reshape(student.shape))
    named = torch.zeros(len(want), dtype=torch.bool)
    named[slice(None) if student_rows is None else student_rows] = True
    assert (rows_of(measured.gradient.cpu(), None)[~named] == 0).all()


def exact_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


@cases.each_mode
@pytest.mark.parametrize("case", CASES)
def test_pairs_are_what_copies_of_their_rows_are(
    backend: str, device: str, gradient: str, case: str
) -> None:
    options = dict(CASES[case])
    vocab = options.pop("vocab", 67)
    student = logits((3, 4, vocab), seed=1)
    teacher = logits((2, 3, options.pop("teacher_vocab", vocab)), seed=2)
    assert_as_of_copies(
        student, teacher, STUDENT_ROWS, TEACHER_ROWS, device,
        backend=backend, gradient=gradient, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_pairs_of_every_dtype(
    backend: str, device: str, student: torch.dtype, teacher: torch.dtype
) -> None:
    if student == torch.float64:
        cases.needs_float64(backend, device)
    z_s, z_t = logits((12, 40), student, seed=1), logits((6, 40), teacher, seed=2)
    assert_as_of_copies(
        z_s, z_t, STUDENT_ROWS.int(), TEACHER_ROWS.int(), device,
        backend=backend, gradient="recompute", labels=LABELS,
    )  # fmt: skip


VIEWS: dict[str, Any] = {
    "padded columns": lambda z: torch.cat([z, z], -1)[..., : z.shape[-1]],
    "every other column": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "all but the last": lambda z: torch.cat([z, z[:, :1]], 1)[:, :-1],
    "transposed": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "one row for all": lambda z: z[:1, :1].expand(z.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_pairs_of_rows_that_lie_anyhow(backend: str, device: str, view: str) -> None:
    """Each model has strides of its own, and the memory of rows is not one piece."""
    lying = VIEWS[view]
    student, teacher = logits((3, 4, 33), seed=1), lying(logits((2, 3, 33), seed=2))
    options = {"backend": backend, "labels": LABELS.to(device)}
    maps = {"student_rows": STUDENT_ROWS.to(device), "teacher_rows": TEACHER_ROWS.to(device)}
    want = evaluate(student.to(device), teacher.contiguous().to(device), **options, **maps)
    for one in (student, lying(student)):
        if view == "one row for all" and one is not student:
            continue
        got = evaluate(one.to(device), teacher.to(device), **options, **maps)
        close(got.loss, want.loss.cpu())
        close(got.gradient, want.gradient.cpu())


def test_one_map_leaves_the_other_models_rows_in_order(backend: str, device: str) -> None:
    options = {"backend": backend, "gradient": "forward", "reduction": "none", "labels": LABELS}
    student, teacher = logits((3, 4, 33), seed=1), logits((5, 33), seed=2)
    assert_as_of_copies(student, teacher, STUDENT_ROWS, None, device, **options)
    student, teacher = logits((5, 33), seed=1), logits((2, 3, 33), seed=2)
    assert_as_of_copies(student, teacher, None, TEACHER_ROWS, device, **options)
    del options["labels"]
    student = logits((5, 1, 33), seed=1)
    assert_as_of_copies(student, teacher[:, :1], None, TEACHER_ROWS % 2, device, **options)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("labelled", (True, False))
def test_outputs_are_those_of_copies(
    backend: str, device: str, reduction: str, labelled: bool
) -> None:
    student, teacher = logits((3, 4, 33), seed=1, device=device), logits((6, 33), device=device)
    student[1, 3, 5] = teacher[2, 7] = 20.0  # rows 7 and 2: their tops
    options = {"reduction": reduction, "return_outputs": True, "z_loss": 0.1, "temperature": 2.0}
    labels = LABELS.to(device) if labelled else None
    maps = (STUDENT_ROWS.to(device), TEACHER_ROWS.to(device))
    got = cases.call(
        student, teacher, labels, student_rows=maps[0], teacher_rows=maps[1], backend=backend,
        **options,
    )  # fmt: skip
    copies = (student.reshape(-1, 33)[maps[0]], teacher[maps[1]])
    for name, one, by in zip(
        got._fields, got, fused_kd_loss(*copies, labels, backend="reference", **options),
        strict=True,
    ):  # fmt: skip
        assert (one is None) == (by is None), name
        if one is not None:
            close(one, by.cpu())


@pytest.mark.parametrize("teacher_count", (6, 0))
def test_no_pairs_are_a_connected_zero(backend: str, device: str, teacher_count: int) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    student, teacher = logits((4, 9), device=device), logits((teacher_count, 9), device=device)
    for reduction, gradient in (("mean", "forward"), ("none", "recompute")):
        got = evaluate(
            student, teacher, student_rows=none, teacher_rows=none, backend=backend,
            reduction=reduction, gradient=gradient,
        )  # fmt: skip
        assert got.loss.shape == ((0,) if reduction == "none" else ())
        assert got.loss.sum() == 0 and (got.gradient == 0).all()


@pytest.mark.parametrize("tail", ("bucket", "uniform", "subset"))
def test_pairs_beside_a_sparse_teacher(backend: str, device: str, tail: str) -> None:
    student = without_others(logits((3, 4, 33), seed=1, device=device), STUDENT_ROWS)
    log_probs, ids = logits((2, 3, 33), device=device).log_softmax(-1).topk(5)
    ids[0, 1, 2] = 10**6  # of a row that no pair has
    leaf, labels = student.requires_grad_(), LABELS.to(device)
    maps = (STUDENT_ROWS.to(device), TEACHER_ROWS.to(device))
    options: dict[str, Any] = {"tail": tail, "alpha": 0.7, "reduction": "none"}
    loss = fused_topk_kd_loss(
        leaf, ids, log_probs, labels, student_rows=maps[0], teacher_rows=maps[1],
        backend=backend, **options,
    )  # fmt: skip
    copy = student.detach().reshape(-1, 33)[maps[0]].double().requires_grad_()
    entries = (x.flatten(0, 1)[maps[1]] for x in (ids, log_probs))
    exact = fused_topk_kd_loss(copy, *entries, labels, backend="reference", **options)
    close(loss, exact.detach().cpu())
    (got,) = torch.autograd.grad(loss.sum(), leaf)
    (want,) = torch.autograd.grad(exact.sum(), copy)
    placed = torch.zeros(12, 33, dtype=torch.float64).index_copy(0, STUDENT_ROWS, want.cpu())
    close(got.reshape(12, 33), placed)


def test_a_bad_entry_is_named_by_its_own_row() -> None:
    log_probs, ids = logits((6, 9)).log_softmax(-1).topk(2)
    ids[2, 1] = 9
    with pytest.raises(IndexError, match="teacher_ids: 9 at row 2"):
        fused_topk_kd_loss(
            logits((12, 9)), ids, log_probs, student_rows=STUDENT_ROWS, teacher_rows=TEACHER_ROWS
        )


@cases.each_mode
def test_maps_may_be_overwritten_before_the_backward(gradient: str) -> None:
    student, teacher = logits((3, 4, 9), seed=1), logits((6, 9), seed=2)
    with torch.inference_mode():
        maps = {"student_rows": STUDENT_ROWS.clone(), "teacher_rows": TEACHER_ROWS.clone()}
    options = {"reduction": "none", "gradient": gradient}
    want = evaluate(student, teacher, LABELS, **options, **maps)
    leaf = student.requires_grad_()
    loss = fused_kd_loss(leaf, teacher, LABELS, **options, **maps)
    with torch.inference_mode():
        for index in maps.values():
            index.zero_()
    (got,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(got, want.gradient)


def test_modules_take_the_rows_of_a_batch() -> None:
    student, teacher = logits((3, 4, 9), seed=1), logits((6, 9), seed=2)
    maps = {"student_rows": STUDENT_ROWS, "teacher_rows": TEACHER_ROWS}
    want = fused_kd_loss(student, teacher, LABELS, temperature=2.0, **maps)
    assert torch.equal(KDLoss(temperature=2.0)(student, teacher, LABELS, **maps), want)
    log_probs, ids = teacher.log_softmax(-1).topk(4)
    sparse = kdkernels.TopKKDLoss(tail="subset")(student, ids, log_probs, LABELS, **maps)
    assert torch.equal(
        sparse, fused_topk_kd_loss(student, ids, log_probs, LABELS, tail="subset", **maps)
    )


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (TypeError, "student_rows: expected a tensor, got list", {"student_rows": [0, 1]}),
        (TypeError, "teacher_rows: dtype torch.float32", {"teacher_rows": torch.zeros(5)}),
        (TypeError, "student_rows: dtype torch.bool", {"student_rows": torch.ones(12) > 0}),
        (ValueError, r"teacher_rows: shape \(5, 1\)", {"teacher_rows": TEACHER_ROWS[:, None]}),
        (ValueError, "student_rows: device meta", {"student_rows": STUDENT_ROWS.to("meta")}),
        (ValueError, "rows, teacher_rows: 4 and 5 rows", {"student_rows": STUDENT_ROWS[:4]}),
        (ValueError, "rows, teacher_rows: 12 and 5 rows", {"student_rows": None}),
        (ValueError, "rows, teacher_rows: 5 and 6 rows", {"teacher_rows": None}),
        (ValueError, r"labels: shape \(3, 4\) .*pairs.*\(5,\)", {"labels": torch.zeros(3, 4)}),
        (ValueError, r"token_weights: .*\(5,\)", {"token_weights": torch.ones(12)}),
        (ValueError, "shift: True .*student_rows", {"shift": True}),
        (IndexError, "student_rows: -1 at 2 .*12", {"student_rows": STUDENT_ROWS - 12 * (
            torch.arange(5) == 2)}),
        (IndexError, "student_rows: 12 at 0", {"student_rows": STUDENT_ROWS + 5}),
        (IndexError, "teacher_rows: -3 at 3", {"teacher_rows": TEACHER_ROWS - 3 * (
            TEACHER_ROWS == 0)}),
        (IndexError, r"teacher_rows: 6 at 0 .*\[0, 6\)", {"teacher_rows": TEACHER_ROWS + 1}),
        (IndexError, "student_rows: 3 comes twice, at 1 and 3",
         {"student_rows": torch.tensor([7, 3, 11, 3, 4])}),
        (IndexError, "labels: 33 at row 2", {"labels": torch.tensor([1, 2, 33, 4, 5])}),
    ],
    ids=lambda x: None,
)  # fmt: skip
def test_what_is_no_map_is_named(
    backend: str, error: type[Exception], match: str, given: dict[str, Any]
) -> None:
    if cases.device_of(backend) != "cpu":
        pytest.skip("nothing is looked at there")
    maps = {"student_rows": STUDENT_ROWS, "teacher_rows": TEACHER_ROWS}
    with pytest.raises(error, match=match):
        fused_kd_loss(logits((3, 4, 33)), logits((6, 33)), backend=backend, **maps | given)


def test_hidden_states_have_no_maps() -> None:
    hidden, weight = logits((5, 4)), logits((9, 4))
    for name in ("student_rows", "teacher_rows"):
        with pytest.raises(ValueError, match=rf"{name}: fused_linear_kd_loss .*hidden\[index\]"):
            fused_linear_kd_loss(hidden, weight, hidden, weight, **{name: torch.arange(5)})


def assert_what_cannot_meet_is_nan(
    backend: str, monkeypatch: pytest.MonkeyPatch, device: str = "cpu"
) -> None:
    """As on a device, whose numbers nobody looks at: also of rows that would not count."""
    monkeypatch.setattr(rows, "_can_raise", lambda tensor: False)
    monkeypatch.setattr("kdkernels.problem.check_label_values", lambda *_: None)
    student = logits((12, 33), seed=1, device=device)
    teacher = logits((6, 33), seed=2, device=device)
    maps = {
        "student_rows": torch.tensor([0, 3, 3, 12, -1, 5, 6], device=device),
        "teacher_rows": torch.tensor([0, 1, 2, 3, 4, 6, 5], device=device),
    }
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0, 2], device=device)
    spoiled = torch.zeros(12, dtype=torch.bool)
    spoiled[[3, 5]] = True
    for reduction, mode in (("mean", "forward"), ("none", "recompute")):
        for alpha, labels in ((1.0, None), (0.0, torch.arange(7, device=device))):
            got = evaluate(
                student, teacher, labels, backend=backend, gradient=mode, reduction=reduction,
                alpha=alpha, token_weights=weights, **maps,
            )  # fmt: skip
            gradient = got.gradient.cpu()
            assert gradient[spoiled].isnan().all()
            assert gradient[~spoiled].isfinite().all() and gradient[[0, 6]].any(-1).all()
            if reduction == "none":
                assert got.loss.isnan().tolist() == [False, *[True] * 5, False]
            else:
                assert got.loss.isnan()


@pytest.mark.parametrize("backend", ("torch", "reference"))
def test_where_nothing_can_be_raised_the_row_is_nan(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_what_cannot_meet_is_nan(backend, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("cuda", "triton", "torch"))
def test_rows_that_meet_on_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that start alike and such that do not, and what no pair can be."""
    for vocab in (4096, 50257):
        student = logits((64, vocab), torch.bfloat16, seed=1)
        teacher = logits((40, vocab), torch.bfloat16, seed=2)
        first = torch.randperm(64, generator=cases.generator(1))[:50]
        second = torch.randint(39, (50,), generator=cases.generator(2))
        labels = cases.labels_for((50,), vocab)
        assert_as_of_copies(
            student, teacher, first, second, "cuda", backend=backend, gradient="forward",
            labels=labels, temperature=2.0,
        )  # fmt: skip
    assert_what_cannot_meet_is_nan(backend, monkeypatch, "cuda")


# ------------------------------------------------------------------------------------ the compiler


def test_maps_compile_whole() -> None:
    torch._dynamo.reset()

    def loss(student: Tensor, teacher: Tensor, first: Tensor, second: Tensor) -> Tensor:
        out = fused_kd_loss(
            student, teacher, LABELS, student_rows=first, teacher_rows=second, reduction="none"
        )
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    tensors = (logits((3, 4, 9), seed=1), logits((6, 9), seed=2), STUDENT_ROWS, TEACHER_ROWS)
    results = []
    for function in (loss, compiled):
        leaf = tensors[0].clone().requires_grad_()
        out = function(leaf, *tensors[1:])
        results.append((out, *torch.autograd.grad(out.sum(), leaf)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(IndexError, match="student_rows: 12"):
        compiled(tensors[0], tensors[1], STUDENT_ROWS + 5, TEACHER_ROWS)


def test_opcheck_of_the_placement() -> None:
    for maps in ((STUDENT_ROWS, TEACHER_ROWS), (STUDENT_ROWS, None), (None, TEACHER_ROWS)):
        rows = 5 if maps[0] is None else 12
        given = (*maps, None if maps[0] is None else LABELS, WEIGHTS, rows, 6, 33, -100)
        torch.library.opcheck(torch.ops.kdkernels.kd_place.default, given)
