"""The extension by itself: its functors, its monoid, its instruction sets, its rows.

The whole matrix through the public functions is in test_matrix.py; here `_native` is called with
raw addresses, and everything it is compared with is written in this file.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels.problem import Options

native = pytest.importorskip(
    "kdkernels._native", reason="kdkernels was installed without its native kernels"
)

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
DIVERGENCES = [
    ("forward_kl", ()),
    ("reverse_kl", ()),
    ("jsd", (0.5,)),
    ("jsd", (0.1,)),
    ("tvd", ()),
    ("skew_forward_kl", (0.0,)),
    ("skew_forward_kl", (0.3,)),
    ("skew_reverse_kl", (0.0,)),
    ("skew_reverse_kl", (0.3,)),
    ("alpha_beta", (0.6, 0.7)),
    ("alpha_beta", (1.5, -0.5)),
    ("alpha_beta", (0.7, 0.0)),
    ("alpha_beta", (0.0, 0.7)),
    ("alpha_beta", (0.5, -0.5)),
    ("alpha_beta", (0.0, 0.0)),
]
IDS = [f"{name}{list(parameters) or ''}" for name, parameters in DIVERGENCES]


def xlogy(weight, logarithm):
    """weight * logarithm with 0 * inf = 0, and no NaN from the branch that is not taken."""
    absent = weight == 0
    return torch.where(absent, 0.0, weight) * torch.where(absent, 0.0, logarithm)


def log_mixture(log_p, log_q, beta):
    """log(beta p + (1 - beta) q)."""
    if beta == 0.0:
        return log_q
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def alpha_beta(a, b, log_p, log_q):
    """The alpha-beta divergence with its limits, as in its paper."""
    p, q = log_p.exp, log_q.exp
    if a == 0 and b == 0:
        return (log_p - log_q) ** 2 / 2
    if b == 0:
        return (xlogy(p() ** a, a * (log_p - log_q)) - p() ** a + q() ** a) / a**2
    if a == 0:
        return (xlogy(q() ** b, b * (log_q - log_p)) - q() ** b + p() ** b) / b**2
    if a + b == 0:
        return (a * (log_q - log_p) + (a * (log_p - log_q)).exp() - 1) / a**2
    s = a + b
    crossed = (a * log_p + b * log_q).exp()
    return -(crossed - a / s * (s * log_p).exp() - b / s * (s * log_q).exp()) / (a * b)


def summand(name, parameters, log_p, log_q):
    """The textbook summand of a divergence, in whatever precision it is given."""
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return xlogy(p, log_p - log_q)
    if name == "reverse_kl":
        return xlogy(q, log_q - log_p)
    if name == "tvd":
        return (p - q).abs() / 2
    if name == "alpha_beta":
        return alpha_beta(*parameters, log_p, log_q)
    beta = parameters[0]
    log_m = log_mixture(log_p, log_q, beta)
    if name == "skew_forward_kl":
        return xlogy(p, log_p - log_m)
    if name == "skew_reverse_kl":
        return xlogy(q, log_q - log_m)
    assert name == "jsd"
    return beta * xlogy(p, log_p - log_m) + (1 - beta) * xlogy(q, log_q - log_m)


# kd_loss by address


#: Of ``call``; alpha is 1 without labels.
DEFAULTS = {
    "ignore_index": -100,
    "row_weights": None,
    "grad_output": None,
    "denominator": 0.0,
    "temperature": 1.0,
    "temperature_squared": True,
    "alpha": 0.5,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "student_scale": 1.0,
    "teacher_scale": 1.0,
    "student_softcap": 0.0,
    "teacher_softcap": 0.0,
    "divergence": "forward_kl",
    "parameters": (),
    "reduce": True,
    "extras": False,
    "threads": 2,
    "gradient_columns": None,
    "gradient_stride": None,
    "vocab": None,
}


def call(student, teacher, labels=None, **options):
    """`_native.kd_loss` on tensors [..., V]; returns loss, gradient and statistics."""
    defaults = DEFAULTS if labels is not None else DEFAULTS | {"alpha": 1.0}
    assert not set(options) - set(defaults), options
    o = {**defaults, **options}
    vocab = o["vocab"] or student.shape[-1]
    lead = student.shape[:-1]
    outer, inner = (1, lead[0]) if len(lead) == 1 else lead
    rows = outer * inner
    result = torch.float64 if student.dtype == torch.float64 else torch.float32
    columns = o["gradient_columns"] or vocab
    loss = torch.full((1 if o["reduce"] else rows,), math.nan, dtype=result)
    statistics = torch.full((10, rows), math.nan, dtype=result)
    stride = o["gradient_stride"] or columns
    gradient = torch.full((rows, stride), math.nan, dtype=student.dtype)[:, :columns]

    def strides(tensor):
        return (0, *tensor.stride()) if len(lead) == 1 else tuple(tensor.stride())

    def address(tensor):
        return 0 if tensor is None else tensor.data_ptr()

    grad_output = o["grad_output"]
    options = Options(
        reduction="mean" if o["reduce"] else "none",
        **{name: o[name] for name in Options._fields if name in o and name != "denominator"},
    )
    problem = (
        native.Logits(student.data_ptr(), CODES[student.dtype], *strides(student)),
        native.Logits(teacher.data_ptr(), CODES[teacher.dtype], *strides(teacher)),
        native.Rows(
            outer, inner, vocab, address(labels), address(o["row_weights"]), address(grad_output),
            0 if grad_output is None or grad_output.dim() == 0 else grad_output.stride(0),
            o["denominator"],
        ),
        native.Options(options),
        native.Results(
            loss.data_ptr(), statistics.data_ptr(), o["extras"], gradient.data_ptr(), columns,
            stride,
        ),
    )  # fmt: skip
    bad = native.kd_loss(*problem, o["threads"])
    return bad, loss, gradient, statistics


def oracle(student, teacher, labels=None, dtype=torch.float64, **o):
    """The same in float64, materialised; the gradient by autograd of the textbook summands."""
    vocab = o.get("vocab") or student.shape[-1]
    z = student[..., :vocab].reshape(-1, vocab).to(dtype, copy=True).requires_grad_()
    alpha = o.get("alpha", 1.0 if labels is None else 0.5)
    t = o.get("temperature", 1.0)

    def cap(x, side):
        x = x * o.get(f"{side}_scale", 1.0)
        c = o.get(f"{side}_softcap", 0.0)
        return c * torch.tanh(x / c) if c else x

    zs = cap(z, "student")
    zt = cap(teacher[..., :vocab].reshape(-1, vocab).to(dtype), "teacher")
    log_q, log_p = torch.log_softmax(zs / t, -1), torch.log_softmax(zt / t, -1)
    both_absent = log_q.isneginf() & log_p.isneginf()
    log_q, log_p = (torch.where(both_absent, -1e4, x) for x in (log_q, log_p))
    terms = summand(o.get("divergence", "forward_kl"), o.get("parameters", ()), log_p, log_q)
    kd = torch.where(both_absent, 0.0, terms).sum(-1)
    kd = kd * (t**2 if o.get("temperature_squared", True) else 1.0)
    lse = torch.logsumexp(zs, -1)
    losses = alpha * kd if alpha else torch.zeros_like(lse)
    counts = torch.ones_like(lse, dtype=torch.bool)
    if labels is not None:
        counts = labels.reshape(-1) != o.get("ignore_index", -100)
        smoothing = o.get("label_smoothing", 0.0)
        label = torch.where(counts, labels.reshape(-1), 0)
        ce = lse - (1 - smoothing) * zs.gather(1, label[:, None])[:, 0]
        if smoothing:
            ce = ce - smoothing * zs.mean(-1)
        if alpha != 1:
            losses = losses + (1 - alpha) * ce
    if o.get("z_loss"):
        losses = losses + o["z_loss"] * lse**2
    weights = o.get("row_weights")
    weights = torch.ones_like(lse) if weights is None else weights.to(dtype)
    losses = torch.where(counts & (weights != 0), losses * weights, 0.0)
    denominator = o.get("denominator", 0.0) or max(int(counts.sum()), 1)
    upstream = o.get("grad_output")
    upstream = torch.ones(()) if upstream is None else upstream
    reduce = o.get("reduce", True)
    if reduce:
        loss = losses.sum() / denominator
        (loss * upstream.to(dtype)).backward()
    else:
        loss = losses
        (losses * upstream.to(dtype) / denominator).sum().backward()
    return loss.detach().reshape(-1), z.grad


def relative(actual, expected):
    """Relative error in the 2-norm."""
    difference = (actual.double() - expected).norm()
    return float(difference / expected.norm().clamp_min(1e-30))


GRADIENT_TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 2e-3,
    torch.float64: 1e-12,
}


def random_case(rows, vocab, dtype, seed, teacher_dtype=None, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=generator) * scale
    teacher = torch.randn(rows, vocab, generator=generator) * scale
    labels = torch.randint(vocab, (rows,), generator=generator)
    return student.to(dtype), teacher.to(teacher_dtype or dtype), labels


def eager_error(student, teacher, labels, **o):
    """How far eager float32 is from float64: (loss, gradient)."""
    loss, gradient = oracle(student, teacher, labels, **o)
    eager_loss, eager_gradient = oracle(student, teacher, labels, dtype=torch.float32, **o)
    return relative(eager_loss, loss), relative(eager_gradient, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=IDS)
@pytest.mark.parametrize("vocab", [7, 1025])
def test_every_divergence_against_float64(name, parameters, dtype, vocab):
    student, teacher, labels = random_case(6, vocab, dtype, seed=vocab)
    labels[2] = -100
    o = {"temperature": 2.0, "divergence": name, "parameters": parameters, "alpha": 0.4}
    expected, expected_gradient = oracle(student, teacher, labels, **o)
    bad, loss, gradient, _ = call(student, teacher, labels, **o)
    assert bad == -1
    assert relative(loss, expected) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert relative(gradient, expected_gradient) < GRADIENT_TOLERANCE[dtype]
    assert (gradient[2] == 0).all()


OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 3.0, "label_smoothing": 0.1},
    {"temperature": 4.0, "z_loss": 1e-3},
    {"temperature": 1.7, "label_smoothing": 1.0},
    {"temperature": 0.5, "temperature_squared": False},
    {"temperature": 50.0, "alpha": 1.0},
    {"temperature": 2.0, "alpha": 0.0, "z_loss": 1e-2},
    {"student_softcap": 5.0, "teacher_softcap": 8.0, "student_scale": 0.5, "teacher_scale": 1.5},
    {"temperature": 2.0, "student_scale": 2.0, "denominator": 11.0},
]


@pytest.mark.parametrize("mixed", [False, True], ids=["same", "mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o))
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_options_against_float64(name, options, mixed):
    student, teacher, labels = random_case(
        5, 1300, torch.float32, seed=3, teacher_dtype=torch.bfloat16 if mixed else None
    )
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    o = dict(
        divergence=name, parameters=(0.3,) if name == "jsd" else (), row_weights=weights, **options
    )
    for reduce in (True, False):
        upstream = torch.tensor(3.0) if reduce else torch.randn(5, 2)[:, 0]
        o.update(reduce=reduce, grad_output=upstream)
        expected, expected_gradient = oracle(student, teacher, labels, **o)
        _, loss, gradient, _ = call(student, teacher, labels, **o)
        loss_error, gradient_error = eager_error(student, teacher, labels, **o)
        assert relative(loss, expected) < 5e-7 + loss_error
        assert relative(gradient, expected_gradient) < 1e-6 + gradient_error
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype):
    student, teacher, labels = random_case(4, 1300, dtype, seed=5)
    labels[0] = student[0].float().argmax()
    teacher[1] = student[1]
    labels[3] = -100
    _, _, _, s = call(student, teacher, labels, temperature=2.0, z_loss=0.1, extras=True)
    z, t = student.double(), teacher.double()
    log_q, log_p = torch.log_softmax(z / 2, -1), torch.log_softmax(t / 2, -1)
    kd = 4 * (log_p.exp() * (log_p - log_q)).sum(-1)
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    lse = torch.logsumexp(z, -1)
    expected = [
        0.5 * kd + 0.5 * ce + 0.1 * lse**2,
        kd,
        ce,
        0.1 * lse**2,
        torch.logsumexp(z / 2, -1),
        torch.logsumexp(t / 2, -1),
        lse,
        -(log_q.exp() * log_q).sum(-1),
        -(log_p.exp() * log_p).sum(-1),
        1.0 * (z.argmax(-1) == t.argmax(-1)) + 2.0 * (z.argmax(-1) == labels),
    ]
    for row, values in enumerate(expected):
        assert torch.allclose(s[row, :3].double(), values[:3].double(), rtol=2e-6, atol=2e-7), row
    assert (s[:, 3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_padding_and_unaligned_rows(dtype):
    wide = torch.randn(3, 4, 1 + 2 * 1025 + 7).to(dtype)
    student = wide[:, :-1, 1:1026]
    teacher = wide.flip(-1)[:, 1:, 0:2050:2]
    o = {"temperature": 2.0, "alpha": 1.0}
    expected, expected_gradient = oracle(student, teacher, **o)
    _, loss, gradient, _ = call(student, teacher, gradient_columns=1030, **o)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient[:, :1025], expected_gradient) < GRADIENT_TOLERANCE[dtype]
    assert (gradient[:, 1025:] == 0).all()
    # Rows that are farther apart: the same bits, and nothing between them.
    _, _, apart, _ = call(student, teacher, gradient_columns=1030, gradient_stride=1040, **o)
    assert torch.equal(apart, gradient)
    assert apart.as_strided((9, 10), (1040, 1), 1030).isnan().all()
    with pytest.raises(ValueError, match="gradient_stride"):
        call(student, teacher, gradient_columns=1030, gradient_stride=1029, **o)
    # A vocabulary that is a prefix, and rows that are all the same memory.
    same = torch.randn(2000).to(dtype).expand(5, 2000)
    _, loss, gradient, _ = call(same, teacher.reshape(-1, 1025)[:5], vocab=1025)
    expected, expected_gradient = oracle(same, teacher.reshape(-1, 1025)[:5], vocab=1025)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < GRADIENT_TOLERANCE[dtype]


# Hard rows


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.05])
@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=IDS)
def test_a_student_that_equals_its_teacher_loses_exactly_nothing(name, parameters, temperature):
    half = (torch.randn(3, 2050) * 5).to(torch.bfloat16)
    half[1, ::3] = -INF
    for student, teacher in [(half, half), (half.float(), half), (half, half.double().float())]:
        _, loss, gradient, _ = call(
            student,
            teacher.clone(),
            divergence=name,
            parameters=parameters,
            temperature=temperature,
        )
        assert loss.item() == 0.0
        assert (gradient == 0).all()


@pytest.mark.parametrize("vocab", [1, 5000])
@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=IDS)
def test_masked_vocabulary_adds_nothing(name, parameters, vocab):
    student, teacher, labels = random_case(3, vocab, torch.float32, seed=1)
    if vocab > 1:
        for tensor in (student, teacher):
            tensor[0, :4000] = -INF
            tensor[1, 10:] = -INF
            tensor[2, ::2] = torch.finfo(torch.float32).min
        labels = torch.tensor([4500, 3, 1])
    o = {"divergence": name, "parameters": parameters, "temperature": 2.0}
    expected, expected_gradient = oracle(student, teacher, labels, **o)
    _, loss, gradient, _ = call(student, teacher, labels, **o)
    if name == "alpha_beta" and min(parameters) <= 0:
        # Powers of vanished probabilities that do not vanish: only finiteness is at stake.
        expected_gradient = gradient.double()
        expected = loss.double()
    assert torch.isfinite(gradient).all()
    assert float((loss.double() - expected).abs().max()) < 2e-6 * (1 + float(expected.abs().max()))
    assert float((gradient.double() - expected_gradient).abs().max()) < 1e-6
    masked = torch.isneginf(student)
    assert (gradient[masked] == 0).all()


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("poison", [math.nan, INF, "all -inf"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_bad_row_is_nan_and_no_other(side, poison, extras):
    student, teacher, labels = random_case(4, 3000, torch.float32, seed=2)
    pair = (student, teacher)
    _, clean, clean_gradient, _ = call(*pair, labels, reduce=False, denominator=1.0)
    if poison == "all -inf":
        pair[side][1] = -INF
    else:
        pair[side][1, 2500] = poison
    _, loss, gradient, _ = call(*pair, labels, reduce=False, denominator=1.0, extras=extras)
    assert loss[1].isnan() and gradient[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(loss[others], clean[others])
    assert torch.equal(gradient[others], clean_gradient[others])
    # Ignored and weightless rows are not looked at.
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    _, loss, gradient, _ = call(*pair, labels, row_weights=weights, extras=extras)
    assert loss.isfinite().all() and (gradient[1] == 0).all() and gradient.isfinite().all()
    labels[1] = -100
    _, loss, gradient, _ = call(*pair, labels, extras=extras)
    assert loss.isfinite().all() and (gradient[1] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("side", [0, 1])
def test_a_soft_cap_does_not_hide_a_nan(side):
    pair = random_case(3, 1500, torch.float32, seed=2)
    pair[side][1, 7] = math.nan
    o = {"student_softcap": 5.0, "teacher_softcap": 5.0, "reduce": False}
    _, loss, gradient, _ = call(*pair, **o)
    assert loss[1].isnan() and gradient[1].isnan().all()
    assert loss[[0, 2]].isfinite().all() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("extras", [False, True])
def test_a_teacher_without_weight_cannot_spoil_the_loss(extras):
    student, teacher, labels = random_case(3, 1500, torch.float32, seed=4)
    teacher[1, 7] = math.nan
    _, loss, gradient, s = call(student, teacher, labels, alpha=0.0, extras=extras)
    expected, expected_gradient = oracle(student, student, labels, alpha=0.0)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6
    if extras:
        assert s[1, 1].isnan() and s[1, 0].isfinite()


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_a_mixture_with_next_to_nothing_of_the_teacher(name):
    """A beta that is 0 as a float32, and a student that has vanished beside its teacher."""
    student, teacher, _ = random_case(3, 1500, torch.float32, seed=4)
    student[0, :700] = -300.0
    student[1, :700] = -INF
    o = {"divergence": name, "parameters": (1e-50,), "alpha": 1.0}
    _, loss, gradient, _ = call(student, teacher, **o)
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("jsd", (0.5,)),
        ("jsd", (0.9,)),
        ("skew_reverse_kl", (0.99,)),
        ("alpha_beta", (0.2, 0.7)),
        ("alpha_beta", (0.01, 0.2)),
        ("alpha_beta", (3.0, 1.5)),
    ],
)
@pytest.mark.parametrize("apart", [1e-3, 1e-2, 1.0, 3.0])
def test_near_and_far_students(name, parameters, apart):
    """From a student that is all but its teacher to one that puts its mass elsewhere."""
    teacher, noise, _ = random_case(4, 5000, torch.float32, seed=12)
    student = teacher + apart * noise
    for temperature in (1.0, 2.0, 20.0):
        o = {"divergence": name, "parameters": parameters, "temperature": temperature, "alpha": 1.0}
        expected, expected_gradient = oracle(student, teacher, **o)
        _, loss, gradient, _ = call(student, teacher, **o)
        loss_error, gradient_error = eager_error(student, teacher, None, **o)
        assert relative(loss, expected) < 1e-6 + 2 * loss_error
        assert relative(gradient, expected_gradient) < 1e-6 + 2 * gradient_error


def test_a_student_without_mass_where_the_teacher_has_some():
    student, teacher, labels = random_case(3, 1500, torch.float32, seed=4)
    student[1, 7] = -INF
    _, loss, gradient, _ = call(student, teacher, labels, reduce=False)
    assert loss[1] == INF and loss[[0, 2]].isfinite().all()
    assert gradient.isfinite().all()
    # And reverse KL where the teacher has none.
    teacher[2, 9] = -INF
    _, loss, _, _ = call(student, teacher, labels, reduce=False, divergence="reverse_kl")
    assert loss[2] == INF


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=IDS)
@pytest.mark.parametrize("temperature", [1e-3, 1e4, 1e6])
def test_extreme_temperatures(name, parameters, temperature):
    student, teacher, _labels = random_case(3, 2000, torch.float32, seed=6)
    if temperature < 1:
        student = (student * 1000).half()
        teacher = (teacher * 1000).half()
        student[0, 5], teacher[0, 6] = 65504.0, 65504.0
    o = {"temperature": temperature, "divergence": name, "parameters": parameters, "alpha": 1.0}
    _, loss, gradient, _ = call(student, teacher, **o)
    expected, expected_gradient = oracle(student, teacher, **o)
    if name == "alpha_beta" and temperature < 1:
        # exp(10^8) has no float32.
        assert not loss.isnan().any()
        return
    loss_error, gradient_error = eager_error(student, teacher, None, **o)
    assert loss.isfinite().all() and gradient.isfinite().all()
    if (name, parameters) == ("skew_reverse_kl", (0.0,)):
        # KL(q || q): nothing to be relative to.
        assert float(loss.abs().max()) < 1e-6 and float(gradient.abs().max()) < 1e-9
        return
    assert relative(loss, expected) <= 2 * loss_error + 1e-6
    if temperature > 1:
        assert relative(gradient, expected_gradient) <= 2 * gradient_error + 1e-6


@pytest.mark.parametrize("offset", [1e8, -1e8])
def test_huge_logits_are_shifted(offset):
    base = torch.randint(-40, 40, (2, 1500)).float()
    student = offset + 8 * base
    teacher = offset + 8 * base.flip(-1)
    labels = torch.tensor([3, 4])
    _, loss, gradient, _ = call(student, teacher, labels, temperature=8.0)
    expected, expected_gradient = oracle(student, teacher, labels, temperature=8.0)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


def test_the_largest_floats_are_logits_like_any_other():
    for huge in (3.4e38, -3.4e38):
        rows = torch.full((2, 1500), huge)
        _, loss, gradient, _ = call(rows, rows.clone(), torch.tensor([3, 4]))
        assert loss.item() == pytest.approx(0.5 * math.log(1500), rel=1e-6)
        assert gradient.isfinite().all()
    rows[0, 7] = 3.4e38
    _, loss, _, _ = call(rows, rows.clone(), torch.tensor([7, 4]), reduce=False)
    assert loss[0].item() == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [(30, 30), (300, -100), (3000, 3000), (-60000, 60000), (700000, 700000), (5, -700000)],
)
def test_logits_far_from_zero_keep_their_digits(of_student, of_teacher, temperature):
    student, teacher, labels = random_case(3, 4000, torch.float32, seed=6)
    student, teacher = student + of_student, teacher + of_teacher
    for name, parameters in DIVERGENCES:
        o = {"divergence": name, "parameters": parameters, "temperature": temperature}
        expected, expected_gradient = oracle(student, teacher, labels, **o)
        _, loss, gradient, _ = call(student, teacher, labels, **o)
        loss_error, gradient_error = eager_error(student, teacher, labels, **o)
        assert relative(loss, expected) < 1e-6 + loss_error, name
        assert relative(gradient, expected_gradient) < 2e-6 + gradient_error, name


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 2.5])
def test_whole_blocks_of_nothing_come_before_the_first_logit(temperature):
    student, teacher, labels = random_case(3, 5000, torch.float32, seed=6)
    labels[:] = torch.tensor([4999, 3000, -100])
    student[0, :2500], teacher[0, :2500] = -INF, -INF
    student[1, :1024], teacher[1, :2048] = -INF, -INF
    teacher[2, :4000] = -INF
    for name in ("forward_kl", "jsd"):
        parameters = (0.5,) if name == "jsd" else ()
        o = {"divergence": name, "parameters": parameters, "temperature": temperature}
        expected, expected_gradient = oracle(student, teacher, labels, **o)
        _, loss, gradient, _ = call(student, teacher, labels, extras=True, **o)
        assert relative(loss, expected) < 1e-6
        assert relative(gradient, expected_gradient) < 2e-6


def test_rising_logits_move_the_reference():
    ramp = torch.linspace(-200, 200, 9000)
    student = torch.stack([ramp, ramp.flip(0), ramp.roll(3000)])
    teacher = torch.stack([ramp.flip(0), ramp.flip(0) * 0.99, ramp * 1.01])
    labels = torch.tensor([8999, 0, 17])
    for name, temperature in [("forward_kl", 2.0), ("reverse_kl", 1.7), ("jsd", 3.0)]:
        o = {"divergence": name, "parameters": (0.5,) if name == "jsd" else ()}
        expected, expected_gradient = oracle(student, teacher, labels, temperature=temperature, **o)
        _, loss, gradient, _ = call(student, teacher, labels, temperature=temperature, **o)
        loss_error, gradient_error = eager_error(
            student, teacher, labels, temperature=temperature, **o
        )
        assert relative(loss, expected) < 1e-6 + loss_error
        assert relative(gradient, expected_gradient) < 2e-6 + gradient_error


def test_labels_out_of_range_are_reported_before_any_work():
    student, teacher, labels = random_case(3, 10, torch.float32, seed=0)
    for bad_label in (10, -1, 2**40):
        labels[1] = bad_label
        bad, loss, gradient, _ = call(student, teacher, labels)
        assert bad == 1 and loss.isnan().all() and gradient.isnan().all()
    labels[1] = -7
    assert call(student, teacher, labels, ignore_index=-7)[0] == -1


def test_no_row_counts():
    student, teacher, _ = random_case(3, 10, torch.float32, seed=0)
    _, loss, gradient, s = call(student, teacher, torch.full((3,), -100), extras=True)
    assert loss.item() == 0 and (gradient == 0).all() and (s == 0).all()
    empty = torch.empty(0, 10)
    bad, loss, gradient, _ = call(empty, empty)
    assert bad == -1 and loss.item() == 0


def test_the_same_bits_for_any_number_of_threads():
    student, teacher, labels = random_case(67, 3001, torch.bfloat16, seed=9)
    first = call(student, teacher, labels, threads=1)
    for threads in (2, 3, 8):
        again = call(student, teacher, labels, threads=threads)
        assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])
        assert torch.equal(first[3], again[3])


def test_large_gradients_bypass_the_cache_and_stay_right():
    # More than 4 MiB of gradient, rows that do not start on a cache line.
    for dtype in DTYPES[:3]:
        student, teacher, labels = random_case(90, 30523, dtype, seed=8)
        _, loss, gradient, _ = call(student, teacher, labels, temperature=2.0)
        expected, expected_gradient = oracle(student, teacher, labels, temperature=2.0)
        assert relative(loss, expected) < 1e-6
        # 65504 / 90 rows: float16 gradients are subnormal here, absolutely rounded.
        tolerance = 0.05 if dtype == torch.float16 else GRADIENT_TOLERANCE[dtype]
        assert relative(gradient, expected_gradient) < tolerance


def run_python(code, **environment):
    """A fresh interpreter that can import this file as `tests_native`."""
    prelude = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('tests_native', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['tests_native'] = module\n"
        "spec.loader.exec_module(module)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )


# Instruction sets

FORCED = """
import torch
from kdkernels import _native
from tests_native import DIVERGENCES, GRADIENT_TOLERANCE, call, oracle, random_case, relative
print(_native.cpu_isa())
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    student, teacher, labels = random_case(3, 1037, dtype, seed=7)
    student[0, 3] = teacher[0, 3] = float("-inf")
    labels[:] = torch.tensor([1, 5, -100])
    for name, parameters in DIVERGENCES:
        o = dict(divergence=name, parameters=parameters, temperature=2.0, label_smoothing=0.0)
        expected, gradient = oracle(student, teacher, labels, **o)
        _, loss, actual, _ = call(student, teacher, labels, extras=True, **o)
        assert relative(loss, expected) < 2e-6, (name, dtype)
        assert relative(actual, gradient) < 2 * GRADIENT_TOLERANCE[dtype], (name, dtype)
"""


@pytest.mark.parametrize("isa", native.cpu_isas())
def test_an_instruction_set_can_be_forced(isa):
    done = run_python(FORCED, KDKERNELS_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


@pytest.mark.parametrize("isa", native.cpu_isas()[:-1])
def test_every_slower_instruction_set_keeps_the_digits(isa):
    """The tests of this file whose logits are far from 0 or from each other, once more."""
    chosen = "far_from_zero or near_and_far or rising or extreme or huge or largest or blocks_of"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env={**os.environ, "KDKERNELS_CPU_ISA": isa},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_impossible_instruction_set_is_refused_at_the_call():
    code = """
from kdkernels import _native
for attempt in range(2):
    try:
        _native.cpu_isa()
    except ValueError as error:
        print(error)
"""
    done = run_python(code, KDKERNELS_CPU_ISA="sse9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sse9") == 2 and "baseline" in done.stdout


# Functors and the monoid

LOG_PROBABILITIES = [0.0, -1e-3, -0.7, -3.0, -40.0, -200.0, -800.0]


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=IDS)
def test_functor_against_autograd(name, parameters):
    for a in LOG_PROBABILITIES:
        for b in LOG_PROBABILITIES:
            log_p = torch.tensor(a, dtype=torch.float64)
            log_q = torch.tensor(b, dtype=torch.float64, requires_grad=True)
            expected = summand(name, parameters, log_p, log_q)
            (slope,) = torch.autograd.grad(expected, log_q)
            value, actual_slope = native.divergence(name, parameters, a, b)
            # Cancelling terms as large as the probabilities and their logarithms round.
            size = max(math.exp(a) * (1 + abs(b)), math.exp(b) * (1 + abs(a)))
            if name == "alpha_beta":
                size = max(size, abs(expected.item()), abs(slope.item()) if slope.isfinite() else 0)
            assert value == pytest.approx(expected.item(), rel=1e-11, abs=1e-13 * size)
            if a == b and name in ("tvd", "alpha_beta"):
                assert actual_slope == 0.0
            elif slope.isfinite():
                assert actual_slope == pytest.approx(slope.item(), rel=1e-11, abs=1e-13 * size)


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCES, ids=IDS)
def test_functor_without_mass(name, parameters):
    assert native.divergence(name, parameters, -INF, -INF) == (0.0, 0.0)
    for a, b in [(-INF, -1.0), (-1.0, -INF)]:
        value, _ = native.divergence(name, parameters, a, b)
        limit = summand(
            name, parameters, *(torch.tensor(max(x, -700.0), dtype=torch.float64) for x in (a, b))
        ).item()
        assert not math.isnan(value)
        if math.isfinite(value):
            assert value == pytest.approx(limit, rel=1e-9, abs=1e-12)
        else:
            assert value > 0 and limit > 100


def test_divergence_arguments_are_checked():
    assert set(native.divergence_names()) == {name for name, _ in DIVERGENCES}
    for name, parameters in [("jsd", (0.0,)), ("jsd", (1.0,)), ("skew_forward_kl", (1.0,))]:
        with pytest.raises(ValueError, match="beta"):
            native.divergence(name, parameters, -1.0, -1.0)
    with pytest.raises(ValueError, match="takes 1 parameters"):
        native.divergence("jsd", (), -1.0, -1.0)
    with pytest.raises(ValueError, match="nonsense"):
        native.divergence("nonsense", (), -1.0, -1.0)


LOGITS = st.lists(st.one_of(st.floats(-700, 700), st.just(-INF)), max_size=6)


def observed(logits):
    state = native.LogSumExp()
    for z in logits:
        state.observe(z)
    return state


def combined(*states):
    total = native.LogSumExp()
    for state in states:
        total.combine(state)
    return total


def agree(a, b):
    return a == b or a == pytest.approx(b, rel=1e-13, abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(LOGITS, LOGITS, LOGITS)
def test_log_sum_exp_is_a_commutative_monoid(x, y, z):
    a, b, c = observed(x), observed(y), observed(z)
    expected = torch.logsumexp(torch.tensor([*x, *y, *z], dtype=torch.float64), 0).item()
    assert agree(combined(combined(a, b), c).value(), expected)
    assert agree(combined(a, combined(b, c)).value(), expected)
    assert agree(combined(c, b, a).value(), expected)
    assert combined(a, native.LogSumExp()).value() == a.value()
    assert combined(native.LogSumExp(), a).value() == a.value()


def test_log_sum_exp_of_nothing_and_of_nan():
    empty = combined(native.LogSumExp(), native.LogSumExp())
    assert empty.value() == -INF and empty.sum == 0.0
    assert math.isnan(observed([1.0, math.nan, 2.0]).value())
    assert native.LogSumExp(3.0, 1.0).value() == 3.0


def test_build_info():
    info = native.build_info()
    assert set(info) >= {"compiler", "openmp"}
    assert native.cpu_isa() in native.cpu_isas()
