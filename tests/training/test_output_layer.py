"""fused_linear of the trainer: output layers are found, checked and left out of the forward."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn

from kdkernels.training.output_layer import Head, NoHead
from kdkernels.training.trainer import DistillationTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread

GPT2: dict[str, Any] = {
    "vocab_size": tiny_models.VOCAB,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 64,
}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
GPT2 |= {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 1}
BERT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
#: Class -> configuration, soft cap, scale.
MODELS: dict[str, tuple[dict[str, Any], float | None, float | None]] = {
    "LlamaForCausalLM": (tiny_models.SIZES, None, None),
    "GPT2LMHeadModel": (GPT2, None, None),
    "Gemma2ForCausalLM": (
        tiny_models.SIZES | {"head_dim": 8, "final_logit_softcapping": 3.0},
        3.0,
        None,
    ),
    "GraniteForCausalLM": (tiny_models.SIZES | {"logits_scaling": 13.0}, None, 1 / 13),
    "CohereForCausalLM": (tiny_models.SIZES | {"logit_scale": 0.0625}, None, 0.0625),
    "BertForMaskedLM": (tiny_models.SIZES | BERT, None, None),
}


def make(kind: str, seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**MODELS[kind][0] | changes))
    bias = model.get_output_embeddings().bias
    if bias is not None:
        nn.init.normal_(bias)
    return model


def trainer(
    output: Path, kind: str, fused_linear: str | bool, teacher: Any = None, **options: Any
) -> DistillationTrainer:
    return tiny_models.trainer(
        output,
        student=options.pop("student", None) or make(kind, 1),
        teacher=teacher or make(kind, 2),
        fused_linear=fused_linear,
        **options,
    )


def results(trained: DistillationTrainer) -> tuple[dict[str, Tensor], list[Any], dict[str, float]]:
    """Parameters, training logs and metrics after training."""
    trained.train()
    names = ("loss", "kd_loss", "ce_loss", "agreement", "accuracy")
    logs = [[e.get(n) for n in names] for e in trained.state.log_history if "loss" in e]
    metrics = trained.evaluate()
    return (
        {name: p.detach() for name, p in trained.model.named_parameters()},
        logs,
        {name: metrics.get(f"eval_{name}") for name in names},
    )


def assert_same(one: DistillationTrainer, other: DistillationTrainer) -> None:
    (a, logs_a, metrics_a), (b, logs_b, metrics_b) = results(one), results(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-5, atol=2e-6, msg=name)
    torch.testing.assert_close(logs_a, logs_b, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(metrics_a, metrics_b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_the_update_is_that_of_logits(kind: str, tmp_path: Path) -> None:
    fused, whole = (trainer(tmp_path, kind, mode) for mode in ("auto", False))
    assert fused._student_head is not None and fused._teacher_head is not None
    assert whole._student_head is None
    assert_same(fused, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"alpha": 0.0},
        {"label_smoothing_factor": 0.1, "z_loss": 1e-3, "divergence": "jsd"},
        {"terms": {"hidden": 1.0}, "balance": "gradient_norm"},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_the_update_is_that_of_logits_with(options: dict[str, Any], tmp_path: Path) -> None:
    kind = "Gemma2ForCausalLM"
    assert_same(*(trainer(tmp_path, kind, mode, **options) for mode in (True, False)))


class Wrapped(nn.Module):
    """A linear layer with a trainable detour of low rank, as adapters have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted() -> Any:
    model = make("LlamaForCausalLM", 1).requires_grad_(False)
    model.model.layers[0].self_attn.q_proj = Wrapped(model.model.layers[0].self_attn.q_proj)
    return model


def test_adapters_with_a_frozen_output_layer(tmp_path: Path) -> None:
    one, other = (
        trainer(tmp_path, "LlamaForCausalLM", mode, student=adapted()) for mode in (True, False)
    )
    assert_same(one, other)
    assert one.model.lm_head.weight.grad is None


def test_logits_exist_only_where_somebody_asks(tmp_path: Path) -> None:
    fused = trainer(tmp_path, "LlamaForCausalLM", True)
    widths: list[int] = []
    for model in (fused.model, fused.teacher):
        model.lm_head.register_forward_hook(lambda _m, _i, out: widths.append(out.shape[-1]))
    fused.train()
    fused.evaluate()
    assert set(widths) == {0}
    predictions = fused.predict(fused.eval_dataset).predictions
    assert predictions.shape == (7, 12, tiny_models.VOCAB)
    batch = {k: v[None] for k, v in fused.train_dataset[0].items()}
    _, outputs = fused.compute_loss(fused.model, batch, return_outputs=True)
    assert outputs.logits.shape == (1, 12, tiny_models.VOCAB)
    assert "forward" not in vars(fused.model.lm_head)


def test_one_model_in_tiles_and_the_other_as_a_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def teacher() -> Any:
        model = make("LlamaForCausalLM", 2)
        model.lm_head = Wrapped(model.lm_head)
        return model

    for roles in ("teacher", "student"):
        models = {roles: teacher()}
        fused = trainer(tmp_path, "LlamaForCausalLM", "auto", **models)
        with caplog.at_level(logging.INFO, "kdkernels"):
            assert_same(fused, trainer(tmp_path, "LlamaForCausalLM", "false", **{roles: teacher()}))
        (line,) = (r.getMessage() for r in caplog.records if "fused_linear" in r.getMessage())
        assert "in tiles only" in line and "Wrapped" in line
        caplog.clear()
        with pytest.raises(ValueError, match=f"fused_linear: {roles}: .*Wrapped"):
            trainer(tmp_path, "LlamaForCausalLM", True, **{roles: teacher()})


def test_the_update_does_not_depend_on_how_the_batch_is_cut(tmp_path: Path) -> None:
    """Four sequences at once or one by one: the denominator is the tokens of the update."""
    kind = "Gemma2ForCausalLM"
    whole, cut = (
        trainer(
            tmp_path,
            kind,
            True,
            per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts,
        )
        for parts in (1, 4)
    )
    tokens = [sum(label != -100 for label in e["labels"][1:]) for e in whole.train_dataset]
    assert len(set(tokens[:4])) > 1  # equal ones could be averaged without the number of tokens
    assert_same(whole, cut)


def test_true_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fused_linear: .*torch_compile"):
        trainer(tmp_path, "LlamaForCausalLM", True, torch_compile=True)
    with pytest.raises(ValueError, match="fused_linear: 'maybe' is not one of"):
        trainer(tmp_path, "LlamaForCausalLM", "maybe")


@pytest.mark.parametrize("kind", MODELS)
def test_heads_are_found_with_their_cap_and_scale(kind: str) -> None:
    model = make(kind, 3).train()
    model.base_model.eval()
    modes = [module.training for module in model.modules()]
    for dtype in (torch.float32, torch.bfloat16):
        head = Head(model.to(dtype))
        assert (head.softcap, head.scale) == MODELS[kind][1:]
    assert [module.training for module in model.modules()] == modes


def _shifted(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _m, _i, out: out + torch.arange(out.shape[-1]))


def _squared(model: Any) -> None:
    model.register_forward_hook(lambda _m, _i, out: out.update(logits=out.logits**2))


def _masked(model: Any) -> None:
    def mask(_m: Any, _i: Any, out: Any) -> None:
        out.logits[..., 10:] = -torch.inf

    model.register_forward_hook(mask)


def _twice(model: Any) -> None:
    model.register_forward_pre_hook(lambda m, _i: (m.lm_head(torch.zeros(1, 16)), None)[1])


@pytest.mark.parametrize("change", [_shifted, _squared, _masked, _twice])
def test_a_model_that_does_more_to_its_logits_is_not_fooled(change: Any) -> None:
    model = make("LlamaForCausalLM", 1)
    Head(model)
    change(model)
    with pytest.raises(NoHead):
        Head(model)
    assert "forward" not in vars(model.lm_head)
