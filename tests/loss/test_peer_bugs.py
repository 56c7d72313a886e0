"""Bugs that other projects had in this loss; the issue is named in each test's docstring."""

from __future__ import annotations

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import evaluate, labels_for, logits, oracle, pair

MIXTURES = pytest.mark.parametrize("name", ("jsd", "skew_forward_kl", "skew_reverse_kl"))


@cases.each_mode
@MIXTURES
@pytest.mark.parametrize("temperature", (1.0, 0.05))
@pytest.mark.parametrize("depth", (104.0, 1e3, 3e38))
def test_item01_entries_that_underflow_on_both_sides(
    backend: str, device: str, name: str, temperature: float, depth: float, gradient: str
) -> None:
    """Liger#1453, #1397, #769: 0 * log 0 = NaN in the mixture."""
    student, teacher = pair((3, 64), device=device)
    student[:, 8:] -= depth
    teacher[:, 8:] -= depth
    options = {"divergence": name, "temperature": temperature}
    measured = evaluate(student, teacher, backend=backend, gradient=gradient, **options)
    head = oracle(student[:, :8], teacher[:, :8], **options)
    assert measured.gradient.isfinite().all()
    torch.testing.assert_close(measured.loss.cpu().double(), head.loss, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(
        measured.gradient[:, :8].cpu().double(), head.gradient, rtol=1e-4, atol=1e-6
    )
    assert (measured.gradient[:, 8:].abs() < 1e-30).all()


@cases.each_dtype
@pytest.mark.parametrize("spec", [s for s in cases.SPECS if s.name != "alpha_beta"], ids=str)
def test_item02_low_temperature_has_the_right_gradient(
    backend: str, device: str, spec: cases.Spec, dtype: torch.dtype
) -> None:
    """Soup#719: finite logits, T = 0.05: finite loss, NaN gradient."""
    student, teacher = pair((7, 90), dtype, seed=5)
    by = cases.standard(student, teacher, None, spec, temperature=0.05)
    measured = evaluate(
        student.to(device), teacher.to(device), backend=backend, temperature=0.05, **spec.arguments
    )
    assert measured.gradient.isfinite().all()
    cases.assert_accurate(measured, by)


@pytest.mark.parametrize("name", ("forward_kl", "jsd"))
def test_item03_a_bfloat16_gradient_is_only_rounded_once(
    backend: str, device: str, name: str
) -> None:
    """Liger#1432, speculators#951: logits rounded before the math: gradient off by 4-23% though
    the loss was within 0.04%."""
    student, teacher = pair((16, 4000), torch.bfloat16, scale=3.0, device=device)
    measured = evaluate(student, teacher, backend=backend, divergence=name).gradient
    exact = oracle(student, teacher, divergence=name).gradient
    relative = (measured.cpu().double() - exact).norm() / exact.norm()
    assert relative < 2.0**-9


@pytest.mark.parametrize("dtypes", cases.DTYPE_PAIRS[4:9], ids=str)
@pytest.mark.parametrize("temperature", (1.0, 0.5, 3.0))
def test_item04_mixed_dtypes_stay_above_zero(
    backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype], temperature: float
) -> None:
    """ms-swift#10156: student float32, teacher bfloat16: JSD -1.7e-4 where 5.1e-4 is right."""
    student, teacher = pair((33, 500), seed=3, device=device)
    teacher = (student + 0.05 * teacher).to(dtypes[1])
    student = student.to(dtypes[0])
    options = {"divergence": "jsd", "temperature": temperature}
    rows = evaluate(student, teacher, backend=backend, reduction="none", **options).loss
    exact = oracle(student, teacher, reduction="none", **options).loss
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.cpu().double(), exact, rtol=1e-2, atol=1e-7)


@cases.each_dtype
@cases.each_mode
@pytest.mark.parametrize("factor", (1.0, 3.0))
def test_item05_total_variation_of_equal_distributions_has_no_gradient(
    backend: str, device: str, dtype: torch.dtype, gradient: str, factor: float
) -> None:
    """Liger#1373, #1374: sign(0) taken as -1: gradient -0.5 * scale."""
    z = logits((5, 130), dtype, device=device)
    z[:, 100:] = -torch.inf
    measured = evaluate(
        z,
        z.clone(),
        backend=backend,
        divergence="tvd",
        gradient=gradient,
        grad_output=torch.tensor(factor, device=device),
    )
    assert measured.loss == 0 and (measured.gradient == 0).all()


@pytest.mark.parametrize("rows", (1, 2, 7, 63, 64, 65, 300, 1025))
@cases.each_mode
def test_item06_ignored_rows_over_any_number_of_chunks(
    backend: str, device: str, rows: int, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger#974, #330: ignore_index unused; a chunk took another chunk's labels."""
    from kdkernels.backends import torch_eager

    monkeypatch.setattr(torch_eager, "CHUNK_BYTES", 7 * 40 * 4)  # 7 rows: divides few of these
    student, teacher = pair((rows, 40), device=device)
    labels = labels_for((rows,), 40, ignored=0.5, device=device)
    measured = evaluate(student, teacher, labels, backend=backend, gradient=gradient)
    exact = oracle(student, teacher, labels)
    torch.testing.assert_close(measured.loss.cpu().double(), exact.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        measured.gradient.cpu().double(), exact.gradient, rtol=1e-5, atol=1e-7
    )
    assert (measured.gradient[labels == -100] == 0).all()


@cases.each_mode
@cases.each_name
def test_item07_item08_no_valid_token_is_a_connected_zero(
    backend: str, device: str, gradient: str, spec: cases.Spec
) -> None:
    """LMOps#38, aiter#5165: 0/0; trl#5569, ms-swift#10085: a detached zero hangs DDP."""
    student, teacher = pair((4, 20), device=device)
    hidden = student.requires_grad_() * 1.0
    labels = torch.full((4,), -100, device=device)
    loss = cases.call(hidden, teacher, labels, backend=backend, gradient=gradient, **spec.arguments)
    assert loss == 0 and loss.grad_fn is not None
    loss.backward()
    assert student.grad is not None and (student.grad == 0).all()


def test_item09_labels_of_masked_rows_may_be_anything_that_is_ignore_index(
    backend: str, device: str
) -> None:
    """Megatron-Bridge#5244: labels -1 or V at masked rows; NaN logits there poison via 0 * NaN."""
    for ignore_index in (-1, 20, 10**6, 3):
        student, teacher = pair((4, 20), device=device)
        labels = torch.tensor([1, ignore_index, 2, ignore_index], device=device)
        options = {"backend": backend, "ignore_index": ignore_index}
        clean = evaluate(student, teacher, labels, **options)
        student[1], teacher[3] = torch.nan, torch.inf
        measured = evaluate(student, teacher, labels, **options)
        assert torch.equal(measured.loss, clean.loss)
        assert torch.equal(measured.gradient, clean.gradient)


def test_item10_padding_at_minus_infinity_has_a_finite_backward(backend: str, device: str) -> None:
    """trl#5594: nan_to_num in the forward, NaN in the backward."""
    for name in cases.BUILT_IN:
        student, teacher = pair((3, 50), device=device)
        student[:, 40:] = teacher[:, 40:] = -torch.inf
        base = student.clone().requires_grad_()
        cases.call(base * 1.0, teacher, backend=backend, divergence=name).backward()
        assert base.grad is not None and base.grad.isfinite().all(), name


@cases.each_mode
def test_item11_unreduced_loss_with_masks_weights_and_any_grad_output(
    backend: str, device: str, gradient: str
) -> None:
    """Liger#678, #968: reduction="none" with ignore_index or weights: wrong gradient."""
    student, teacher = pair((2, 5, 33), device=device)
    labels = labels_for((2, 5), 33, ignored=0.4, device=device)
    weights = torch.rand(2, 5, device=device)
    for upstream in (
        torch.rand(2, 5, device=device),
        torch.rand(5, 2, device=device).T,
        torch.rand(1, 5, device=device).expand(2, 5),
        torch.rand(2, 10, device=device)[:, ::2],
    ):
        options = {"reduction": "none", "token_weights": weights}
        measured = evaluate(
            student,
            teacher,
            labels,
            backend=backend,
            gradient=gradient,
            grad_output=upstream,
            **options,
        )
        exact = oracle(student, teacher, labels, grad_output=upstream.cpu().double(), **options)
        torch.testing.assert_close(
            measured.gradient.cpu().double(), exact.gradient, rtol=1e-5, atol=1e-7
        )


@cases.each_name
def test_item12_a_student_equal_to_its_teacher_costs_exactly_nothing(
    backend: str, device: str, spec: cases.Spec
) -> None:
    """trl#5731: 0.5 CE mixed in silently, and temperature 0.9."""
    z = logits((4, 50), device=device)
    labels = labels_for((4,), 50, device=device)
    assert evaluate(z, z, labels, backend=backend, alpha=1.0, **spec.arguments).loss == 0


def test_item12_mixture_weights_are_not_swapped(backend: str, device: str) -> None:
    """trl#3043: end points and an asymmetric beta."""
    student, teacher = (z.double() for z in pair((6, 40), scale=3.0, device="cpu"))
    log_q, log_p = (F.log_softmax(z, -1) for z in (student, teacher))
    forward = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    mixture = torch.log(0.9 * log_p.exp() + 0.1 * log_q.exp())
    lopsided = (
        0.9 * (log_p.exp() * (log_p - mixture)).sum(-1).mean()
        + 0.1 * (log_q.exp() * (log_q - mixture)).sum(-1).mean()
    )
    for beta, expected in ((0.0, forward), (1.0, reverse), (0.9, lopsided)):
        loss = cases.call(
            student.float().to(device),
            teacher.float().to(device),
            backend=backend,
            divergence="jsd",
            beta=beta,
        )
        torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=0)


@cases.each_mode
@pytest.mark.parametrize("alpha", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("temperature", (0.5, 1.0, 4.0))
def test_item13_gradient_of_the_total(
    backend: str, device: str, alpha: float, temperature: float, gradient: str
) -> None:
    """axolotl#3660: CE missing from the gradient only, T^2 on the value only; ModelOpt: no T^2."""
    student, teacher = pair((6, 70))
    labels = labels_for((6,), 70)
    options = {"alpha": alpha, "temperature": temperature}
    by = cases.standard(student, teacher, labels, cases.FEW[0], **options)
    measured = evaluate(
        student.to(device),
        teacher.to(device),
        labels.to(device),
        backend=backend,
        gradient=gradient,
        **options,
    )
    cases.assert_accurate(measured, by)
    kd = oracle(student, teacher, temperature=temperature).gradient
    assert kd.abs().max() > 1e-3, "the terms are large enough to be missed"


def test_item14_micro_batches_are_weighed_by_their_tokens(backend: str, device: str) -> None:
    """trl#4719, #6006, #6478, ms-swift#10076, Soup#720: the mean of means is 2.0, 2.5 is right."""

    def logits_with_kl(kl: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Teacher one-hot: KL is -log q of its entry."""
        q = torch.tensor([torch.tensor(-kl).exp(), 0.0])
        q[1] = 1 - q[0]
        return q.log(), torch.tensor([0.0, -torch.inf])

    rows = [logits_with_kl(kl) for kl in (1.0, 3.0, 3.0, 3.0)]
    student, teacher = (torch.stack(z).to(device) for z in zip(*rows, strict=True))
    whole = evaluate(student, teacher, backend=backend)
    assert float(whole.loss) == pytest.approx(2.5, rel=1e-6)
    for items in (4, torch.tensor(4, device=device)):
        parts = [
            evaluate(student[at], teacher[at], backend=backend, num_items=items)
            for at in (slice(0, 1), slice(1, 4))
        ]
        assert float(sum(p.loss for p in parts)) == pytest.approx(2.5, rel=1e-6)
        torch.testing.assert_close(torch.cat([p.gradient for p in parts]), whole.gradient)


@pytest.mark.parametrize("vocab", (1000, 100278, 32001))
@cases.each_mode
def test_item17_rows_sliced_from_padded_vocabularies(
    backend: str, device: str, vocab: int, gradient: str
) -> None:
    """prime-rl#2497: [..., :V] of padded logits indexed as row * V; strides differ between both."""
    student, teacher = pair((2, 3, vocab + 10), torch.bfloat16, device=device)
    student[..., vocab:] = teacher[..., vocab:] = torch.nan
    student, teacher = student[:, :-1, :vocab], teacher[:, :-1, : vocab + 3]
    teacher = torch.cat([teacher, teacher], 1)[:, :2, :vocab]
    measured = evaluate(student, teacher, backend=backend, gradient=gradient)
    expected = evaluate(
        student.contiguous(), teacher.contiguous(), backend=backend, gradient=gradient
    )
    assert torch.equal(measured.loss, expected.loss)
    assert torch.equal(measured.gradient, expected.gradient)


@pytest.mark.parametrize("shape", ((70_000, 3), (3, 262_208), (2, 35_000, 2)), ids=str)
def test_item19_many_rows_and_wide_vocabularies(
    backend: str, device: str, shape: tuple[int, ...]
) -> None:
    """Liger#1294: more than 65535 rows; unsloth#19, SpecForge#826: V above a block's limit."""
    student, teacher = pair(shape, torch.bfloat16, device=device)
    exact = oracle(student, teacher)
    measured = evaluate(student, teacher, backend=backend)
    torch.testing.assert_close(measured.loss.cpu().double(), exact.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        measured.gradient.cpu().double(),
        exact.gradient,
        rtol=2.0**-8,
        atol=float(exact.gradient.abs().max()) * 1e-6,
    )


@cases.each_mode
def test_item20_softcap_and_scale_are_applied(backend: str, device: str, gradient: str) -> None:
    """trl#6629: softcap and scale ignored."""
    student, teacher = pair((4, 60), scale=20.0)
    options = {"logit_softcap": (10.0, 30.0), "logit_scale": (0.25, 2.0)}
    by = cases.standard(student, teacher, None, cases.FEW[0], **options)
    measured = evaluate(
        student.to(device), teacher.to(device), backend=backend, gradient=gradient, **options
    )
    cases.assert_accurate(measured, by)
    without = evaluate(student.to(device), teacher.to(device), backend=backend)
    assert abs(float(without.loss - measured.loss)) > 0.1


@pytest.mark.parametrize("larger", ("student", "teacher"))
@cases.each_mode
def test_item20_truncation_of_identical_shared_logits_is_exactly_zero(
    backend: str, device: str, larger: str, gradient: str
) -> None:
    """Liger#634: zero padding of 151936 against 152064 gave a loss for equal distributions."""
    wide = logits((2, 15_206), torch.bfloat16, device=device)
    narrow = wide[:, :15_193].clone()
    student, teacher = (wide, narrow) if larger == "student" else (narrow, wide)
    measured = evaluate(
        student, teacher, backend=backend, vocab_policy="truncate", gradient=gradient
    )
    assert measured.loss == 0
    assert measured.gradient.shape == student.shape
    assert (measured.gradient[:, 15_193:] == 0).all()


def test_item20_the_gradient_of_unnormalised_targets_does_not_occur(
    backend: str, device: str
) -> None:
    """Automodel#2428: p that does not sum to 1. Here p is a softmax: rows of the gradient sum to
    0 even if the teacher's logits are far from normalised."""
    student, teacher = pair((5, 80), device=device)
    measured = evaluate(student, teacher + 1e4, backend=backend).gradient
    assert (measured.sum(-1).abs() < 1e-6).all()
