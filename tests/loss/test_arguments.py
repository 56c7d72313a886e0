"""Every bad argument gets an error that names it, its value and what is allowed; and KDLoss."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import pydoc
import re
from typing import Any

import cases
import pytest
import torch

import kdkernels
from kdkernels import FusedLinearKDLoss, KDLoss, fused_kd_loss, fused_linear_kd_loss
from kdkernels.backends import BACKENDS
from kdkernels.divergences import JSD, AlphaBeta, SkewForwardKL, SkewReverseKL
from kdkernels.options import Given, check
from kdkernels.problem import Options, Problem
from kdkernels.rows import ROW_MAPS

LABELS = torch.tensor([0, 1, 2])
NUMBERS = ("temperature", "alpha", "label_smoothing", "z_loss", "logit_softcap", "logit_scale")


def refuse(error: type[Exception], match: str, *tensors: Any, **options: Any) -> None:
    if not tensors:
        tensors = (*cases.pair((3, 8)), LABELS)
    with pytest.raises(error, match=match):
        fused_kd_loss(*tensors, **options)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf), ids=str)
def test_numbers_must_be_finite(name: str, value: float) -> None:
    refuse(ValueError, rf"{name}.*{value}", **{name: value})


@pytest.mark.parametrize("name", (*NUMBERS, "beta", "num_items"))
@pytest.mark.parametrize(
    "value", ("2", [2.0, 1.0, 3.0], {}, 1j, object()), ids=lambda v: type(v).__name__
)
def test_numbers_must_be_numbers(name: str, value: Any) -> None:
    refuse((TypeError, ValueError), name, **{name: value})


@pytest.mark.parametrize("name", ("temperature", "alpha", "label_smoothing", "z_loss", "beta"))
def test_a_tensor_is_not_a_number(name: str) -> None:
    refuse(TypeError, rf"{name}.*Tensor", **{name: torch.tensor(0.5)})


@pytest.mark.parametrize("name", ("temperature", "label_smoothing", "z_loss", "beta"))
def test_none_is_not_a_number(name: str) -> None:
    refuse(TypeError, rf"{name}.*NoneType", **{name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        # Beyond float32 these gave NaN; the smallest temperatures hung the CPU kernel.
        ("temperature", 1e-39),
        ("temperature", 1e39),
        ("logit_scale", 1e39),
        ("logit_scale", (1.0, -1e-40)),
        ("logit_softcap", 1e39),
        ("logit_softcap", 1e-40),
        ("alpha", -1e39),
        ("z_loss", 1e39),
        ("num_items", 1e-300),
        ("ignore_index", 2**63),
        ("ignore_index", -(10**30)),
        ("beta", 1e300),
        ("label_smoothing", -0.1),
        ("label_smoothing", 1.1),
        ("z_loss", -1e-4),
        ("num_items", 0),
        ("num_items", -3),
        ("num_items", math.inf),
        ("logit_softcap", -1.0),
        ("logit_softcap", 0.0),
        ("logit_softcap", (30.0, 0)),
        ("logit_softcap", (30.0, -2.0)),
        ("logit_scale", 0.0),
        ("logit_scale", (1.0, 0.0)),
        ("logit_scale", (1.0, 2.0, 3.0)),
        ("logit_softcap", (1.0,)),
        ("reduction", "avg"),
        ("reduction", None),
        ("reduction", "batchmean"),
        ("vocab_policy", "pad"),
        ("vocab_policy", None),
        ("gradient", "backward"),
        ("gradient", True),
        ("backend", "gpu"),
        ("backend", ""),
        ("divergence", "kl"),
        ("divergence", ""),
        ("divergence", "Forward_KL"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    *_, shown = value if isinstance(value, tuple) else (value,)
    refuse(ValueError, f"{name}.*{re.escape(repr(shown))}", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", True),
        ("alpha", True),
        ("shift", 1),
        ("shift", "yes"),
        ("temperature_squared", "no"),
        ("temperature_squared", None),
        ("return_outputs", "yes"),
        ("ignore_index", -100.0),
        ("ignore_index", None),
        ("ignore_index", True),
        ("divergence", None),
        ("divergence", 3),
        ("divergence", JSD),
        ("backend", 1),
    ],
    ids=str,
)
def test_values_of_another_type_are_named(name: str, value: Any) -> None:
    refuse((TypeError, ValueError), name, **{name: value})


@pytest.mark.parametrize(
    ("divergence", "beta", "match"),
    [
        ("jsd", -0.1, r"beta: -0.1 .*\[0, 1\]"),
        ("jsd", 1.5, r"beta: 1.5 .*\[0, 1\]"),
        ("jsd", math.nan, "beta: nan"),
        ("skew_forward_kl", 1.0, r"beta: 1.0 .*\[0, 1\)"),
        ("skew_reverse_kl", 0.0, r"beta: 0.0 .*\(0, 1\]"),
        ("forward_kl", 0.3, "beta: 0.3 .*'forward_kl' has no beta"),
        ("tvd", 0.0, "beta: 0.0 .*'tvd' has no beta"),
        ("alpha_beta", 0.2, r"beta: 0.2 .*AlphaBeta\(alpha, beta\)"),
        (AlphaBeta(0.1, 0.2), 0.3, "beta: 0.3 .*object"),
    ],
    ids=str,
)
def test_beta_is_in_range_and_never_unread(divergence: Any, beta: float, match: str) -> None:
    refuse(ValueError, match, divergence=divergence, beta=beta)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (JSD, (-0.1,)),
        (JSD, (math.nan,)),
        (SkewForwardKL, (1.0,)),
        (SkewReverseKL, (0.0,)),
        (AlphaBeta, (math.inf, 0.0)),
        (AlphaBeta, (0.1, math.nan)),
        (AlphaBeta, (1e-5, 0.5)),
        (AlphaBeta, (0.5, -101)),
    ],
)
def test_divergence_objects_check_their_parameters(cls: Any, arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"(alpha|beta): "):
        cls(*arguments)


Z = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("error", "match", "tensors"),
    [
        (TypeError, "student_logits: expected a tensor.*list", ([[1.0]], Z)),
        (TypeError, "teacher_logits: expected a tensor.*NoneType", (Z, None)),
        (TypeError, "student_logits: dtype torch.int64", (Z.long(), Z)),
        (TypeError, "teacher_logits: dtype torch.bool", (Z, Z.bool())),
        (TypeError, "student_logits: dtype torch.complex64", (Z.to(torch.complex64), Z)),
        (TypeError, "student_logits: dtype torch.float8", (Z.to(torch.float8_e4m3fn), Z)),
        (TypeError, "student_logits: layout torch.sparse", (Z.to_sparse(), Z)),
        (ValueError, r"student_logits: shape \(\)", (torch.tensor(1.0), torch.tensor(1.0))),
        (ValueError, r"student_logits: shape \(3, 0\)", (Z[:, :0], Z[:, :0])),
        (ValueError, r"student_logits: shape \(0,\)", (Z[0, :0], Z[0, :0])),
        (ValueError, r"teacher_logits: leading shape \(2,\).*\(3,\)", (Z, Z[:2])),
        (ValueError, r"teacher_logits: leading shape \(1, 3\).*\(3,\)", (Z, Z[None])),
        (ValueError, r"teacher_logits: leading shape \(1,\).*\(3,\)", (Z, Z[:1])),
        (ValueError, "teacher_logits: vocabulary 7 differs.* 8; .*truncate", (Z, Z[:, :7])),
        (ValueError, "teacher_logits: device meta differs.*cpu", (Z, Z.to("meta"))),
        (TypeError, "labels: expected a tensor, got list", (Z, Z, [0, 1, 2])),
        (TypeError, "labels: dtype torch.float32", (Z, Z, LABELS.float())),
        (TypeError, "labels: dtype torch.bool", (Z, Z, LABELS.bool())),
        (ValueError, r"labels: shape \(2,\).*\(3,\)", (Z, Z, LABELS[:2])),
        (ValueError, r"labels: shape \(3, 1\).*\(3,\)", (Z, Z, LABELS[:, None])),
        (ValueError, r"labels: shape \(3, 8\).*\(3,\)", (Z, Z, Z.long())),
        (ValueError, r"labels: shape \(\).*\(3,\)", (Z, Z, LABELS[0])),
        (ValueError, "labels: device meta", (Z, Z, LABELS.to("meta"))),
    ],
)
def test_tensors_that_do_not_fit(
    error: type[Exception], match: str, tensors: tuple[Any, ...]
) -> None:
    refuse(error, match, *tensors)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "token_weights: expected a tensor", {"token_weights": [1.0] * 3}),
        (ValueError, r"token_weights: shape \(4,\)", {"token_weights": torch.ones(4)}),
        (ValueError, "token_weights: device meta", {"token_weights": torch.ones(3, device="meta")}),
        (TypeError, "token_weights: dtype torch.complex", {"token_weights": torch.ones(3) * 1j}),
        (
            ValueError,
            "token_weights: requires grad",
            {"token_weights": torch.ones(3, requires_grad=True)},
        ),
        (ValueError, r"num_items: shape \(2,\)", {"num_items": torch.ones(2)}),
        (ValueError, "num_items", {"num_items": torch.ones(()) * 1j}),
        (ValueError, "num_items: 3 .*'sum'", {"num_items": 3, "reduction": "sum"}),
        (ValueError, "num_items: .*'none'", {"num_items": torch.ones(()), "reduction": "none"}),
        (ValueError, r"shift: .*\(3, 8\)", {"shift": True}),
    ],
    ids=str,
)
def test_options_that_do_not_fit(
    error: type[Exception], match: str, options: dict[str, Any]
) -> None:
    refuse(error, match, **options)


def test_options_of_labels_without_labels_are_refused() -> None:
    for alpha in (0.0, 0.5, 2.0):
        refuse(ValueError, rf"alpha: {alpha} .*labels is None", Z, Z, alpha=alpha)
    refuse(ValueError, "label_smoothing: 0.1 .*labels is None", Z, Z, label_smoothing=0.1)
    fused_kd_loss(Z, Z, alpha=1)


def test_unknown_keywords_and_positional_options_are_refused() -> None:
    for options in ({"temprature": 2.0}, {"log_target": True}):
        with pytest.raises(TypeError, match=next(iter(options))):
            fused_kd_loss(Z, Z, **options)
    with pytest.raises(TypeError):
        fused_kd_loss(Z, Z, LABELS, 2.0)


def test_nothing_is_computed_before_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.backends import BACKENDS

    for one in BACKENDS.values():
        monkeypatch.setattr(type(one), "forward", lambda *a, **k: pytest.fail("computed"))
    refuse(ValueError, "temperature", temperature=-1)
    refuse(ValueError, "num_items", num_items=3, reduction="sum")


def test_a_backend_that_cannot_run_says_why_and_which_could() -> None:
    meta = Z.to("meta")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run .*cpu: .*torch"):
        fused_kd_loss(meta, meta, backend="cpu")


def test_available_backends_lists_every_backend_with_reasons() -> None:
    found = kdkernels.available_backends()
    assert {"cpu", "torch", "reference"} <= set(found)
    assert found["torch"] == found["reference"] == []
    assert all(isinstance(reason, str) for reasons in found.values() for reason in reasons)


@pytest.mark.parametrize("backend", ("cpu", "torch", "reference"))
@pytest.mark.parametrize(
    "options",
    (
        {"temperature": 1e-18},
        {"temperature": 1e18},
        {"logit_scale": 1e-18},
        {"logit_scale": 1e18},
        {"logit_softcap": 1e-18},
        {"logit_softcap": 1e18},
        {"num_items": 1e-18},
        {"num_items": 1e18},
        {"alpha": -1e18},
        {"z_loss": 1e18},
    ),
    ids=str,
)
def test_the_ends_of_the_ranges_compute(backend: str, options: dict[str, Any]) -> None:
    if reasons := kdkernels.available_backends()[backend]:
        pytest.skip("; ".join(reasons))
    student, teacher = cases.pair((3, 40))
    student[:, 5] = teacher[:, 5] = -math.inf
    student.requires_grad_()
    loss = fused_kd_loss(student, teacher, LABELS, backend=backend, **options)
    loss.backward()
    assert student.grad is not None
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[:, 5] == 0).all()


@pytest.mark.parametrize("kind", (int, float))
def test_equal_numbers_of_other_types_are_the_same_options(kind: type) -> None:
    numpy = pytest.importorskip("numpy")
    student, teacher = cases.pair((3, 8))
    expected = fused_kd_loss(student, teacher, temperature=2.0)
    for two in (kind(2), numpy.float32(2), numpy.float64(2), numpy.int64(2)):
        assert torch.equal(fused_kd_loss(student, teacher, temperature=two), expected)


# ------------------------------------------------------------------------------------ the module


def test_module_gives_the_functions_result() -> None:
    student, teacher = cases.pair((2, 3, 8))
    labels = cases.labels_for((2, 3), 8)
    options = {"temperature": 2.0, "alpha": 0.9, "shift": True, "divergence": "jsd", "beta": 0.1}
    weights = torch.rand(2, 3)
    module = KDLoss(**options)
    assert torch.equal(
        module(student, teacher, labels, token_weights=weights, num_items=5),
        fused_kd_loss(student, teacher, labels, token_weights=weights, num_items=5, **options),
    )
    assert KDLoss(return_outputs=True)(student, teacher).agreement is not None


@pytest.mark.parametrize("name", ("temprature", "student_logits", "labels", "T"))
def test_module_refuses_unknown_options(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        KDLoss(**{name: 1.0})


def test_module_has_no_state_and_can_be_copied_and_pickled() -> None:
    module = KDLoss(temperature=2.0, divergence=AlphaBeta(0.1, 0.3))
    student, teacher = cases.pair((3, 8))
    assert not module.state_dict() and not list(module.parameters())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half()):
        assert torch.equal(other(student, teacher), module(student, teacher))


def test_module_shows_its_options() -> None:
    assert repr(KDLoss(temperature=2.0, divergence="jsd")) == (
        "KDLoss(temperature=2.0, divergence='jsd')"
    )


@pytest.mark.parametrize("module", (KDLoss, FusedLinearKDLoss))
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: -1 is not"),
        ({"divergence": "jds"}, "divergence: 'jds' is not one of"),
        ({"divergence": "tvd", "beta": 0.1}, "beta"),
        ({"alpha": math.nan}, "alpha"),
        ({"reduction": "avg"}, "reduction: 'avg'"),
        ({"reduction": "sum", "num_items": 3}, "num_items: 3 is the denominator"),
        ({"ignore_index": 2**63}, "ignore_index"),
        ({"label_smoothing": 1.1}, "label_smoothing: 1.1"),
        ({"logit_softcap": (1.0, 2.0, 3.0)}, "logit_softcap"),
        ({"logit_scale": [0.0, 1.0]}, "logit_scale"),
        ({"vocab_policy": "pad"}, "vocab_policy: 'pad'"),
        ({"gradient": "backward"}, "gradient: 'backward'"),
        ({"backend": "cdua"}, "backend: 'cdua' is not one of cpu, cuda"),
    ],
)
def test_module_refuses_bad_options_at_construction(
    module: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        module(**options)


@pytest.mark.parametrize("module", (KDLoss, FusedLinearKDLoss))
@pytest.mark.parametrize("name", ("shift", "temperature_squared", "return_outputs"))
def test_module_refuses_flags_that_are_words(module: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: 'no' is neither True nor False"):
        module(**{name: "no"})


def test_the_linear_module_refuses_a_bad_chunk() -> None:
    with pytest.raises(ValueError, match=r"max_chunk_bytes: 0\.5 is not an int > 0"):
        FusedLinearKDLoss(max_chunk_bytes=0.5)


def test_the_options_are_written_out_once() -> None:
    signature = inspect.signature(fused_kd_loss)
    options = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    tensors = {"token_weights", *ROW_MAPS}
    assert [p.name for p in options if p.name not in tensors] == list(Given._fields)
    assert list(inspect.signature(KDLoss).parameters.values()) == options
    linear = inspect.signature(fused_linear_kd_loss).parameters
    options = [p for p in options if p.name not in ROW_MAPS]
    assert all(linear[p.name] == p for p in options) and not linear.keys() & set(ROW_MAPS)
    for shown in (KDLoss, FusedLinearKDLoss, fused_linear_kd_loss):
        text = pydoc.render_doc(shown, renderer=pydoc.plaintext)
        assert all(f"{p.name}: " in text and repr(p.default) in text for p in options)


def test_equal_options_are_one_object_and_can_be_a_key() -> None:
    defaults = {n: (fused_kd_loss.__kwdefaults__ or {})[n] for n in Given._fields}
    given = Given(**defaults | {"divergence": AlphaBeta(0.2, 0.7)})
    first, second = (check(given, with_labels=True) for _ in range(2))
    assert first is second and {first.options: 1}[second.options] == 1
    assert check(given, with_labels=False).options.alpha == 1.0 != first.options.alpha


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_a_backend_multiplies_a_stored_gradient_before_rounding(
    backend: str, device: str, reduction: str
) -> None:
    if reasons := kdkernels.available_backends()[backend]:
        pytest.skip("; ".join(reasons))
    rows = cases.pair((3, 40), torch.float16, torch.float16, device=device)
    labels = cases.labels_for((3,), 40, device=device)
    problem = Problem(*rows, labels, None, None, Options(alpha=0.5, reduction=reduction))
    shape = () if reduction == "mean" else (3,)
    factor = torch.full(shape, 2.0**12, device=device)
    results = [
        BACKENDS[backend].forward(problem, want_gradient=True, extras=False, grad_output=given)
        for given in (factor, None)
    ]
    assert torch.equal(results[0].loss, results[1].loss)
    recomputed = BACKENDS[backend].backward(problem, results[1].statistics, factor)
    assert results[0].gradient is not None and results[1].gradient is not None
    assert torch.equal(results[0].gradient, recomputed)
    plain = results[1].gradient.double() * 2.0**12
    torch.testing.assert_close(results[0].gradient.double(), plain, rtol=2e-3, atol=2.0**-10)
