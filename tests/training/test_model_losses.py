"""What a model adds to its loss beside cross-entropy, and checkpointing that would hide it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_berts
import tiny_models
import torch
import transformers
from test_wrapped_models import Wrapper
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread

SIZES = tiny_models.SIZES | {"num_hidden_layers": 2, "output_router_logits": True}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.5},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "router_aux_loss_coef": 0.5,
    },
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "router_aux_loss_coef": 0.5,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "router_aux_loss_coef": 0.5,
    },
    "GraniteMoe": {"num_local_experts": 4, "router_aux_loss_coef": 0.5, "logits_scaling": 2.0},
    "JetMoe": {"num_local_experts": 4, "kv_channels": 8, "aux_loss_coef": 0.5},
}


def mixture(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SIZES | MIXTURES[name] | options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def batch(length: int = 12) -> dict[str, Any]:
    ids = tiny_models.dataset(4, length).blocks
    return {"input_ids": ids, "labels": ids.clone()}


def gradients(model: Any) -> dict[str, Any]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("fused_linear", ["true", "false"])
def test_the_routers_loss_is_added_as_transformers_adds_it(
    name: str, fused_linear: str, tmp_path: Path
) -> None:
    student = mixture(name)
    trainer = tiny_models.trainer(tmp_path, None, student, alpha=0.0, fused_linear=fused_linear)
    own = student.train()(**batch())
    own.loss.backward()
    want = gradients(student)
    student.zero_grad()
    loss = trainer.compute_loss(student, batch())
    loss.backward()
    logits = own.logits[:, :-1].detach().double().flatten(0, 1)
    plain = functional.cross_entropy(logits, batch()["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(float(plain + 0.5 * own.aux_loss), rel=1e-5)
    assert own.aux_loss > 0.1
    for key, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("terms", [None, "response=2,hidden=1"])
def test_it_is_logged_and_evaluated(terms: str | None, tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, student=mixture("Mixtral"), terms=terms, max_steps=1)
    evaluated = trainer.evaluate()
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "kd_loss" in entry)
    for metrics in (evaluated, logged):
        found = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        assert found["aux_loss"] > 0.1
        response = 0.7 * found["kd_loss"] + 0.3 * found["ce_loss"]
        want = response if terms is None else 2 * response + found["hidden_loss"]
        assert found["loss"] == pytest.approx(want + 0.5 * found["aux_loss"], rel=1e-5)


def test_an_update_has_the_mean_of_its_micro_batches(tmp_path: Path) -> None:
    """Not their sum: the weight of the router's loss does not depend on how a batch is cut."""
    whole = tiny_models.trainer(tmp_path, student=mixture("Mixtral"), max_steps=1)
    cut = tiny_models.trainer(
        tmp_path,
        student=mixture("Mixtral"),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    logs = []
    for trainer in (whole, cut):
        # Examples of one length, so that micro-batches count alike, and each of them twice.
        trainer.train_dataset = tiny_models.TokenBlocks(tiny_models.dataset(2).blocks.repeat(2, 1))
        trainer.args.train_sampling_strategy = "sequential"
        trainer.train()
        logs.append(next(e for e in trainer.state.log_history if "loss" in e))
    for name in ("loss", "aux_loss", "kd_loss", "ce_loss"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5), name
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_wrapped_mixture(tmp_path: Path) -> None:
    student = mixture("Mixtral")
    losses = [
        tiny_models.trainer(tmp_path, student=model).compute_loss(model, batch()).item()
        for model in (student, Wrapper(student))
    ]
    assert losses[0] == losses[1]


def test_a_router_that_is_not_asked_adds_nothing(tmp_path: Path) -> None:
    student = mixture("Mixtral", output_router_logits=False)
    trainer = tiny_models.trainer(tmp_path, student=student)
    assert "eval_aux_loss" not in trainer.evaluate()


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    nameless = tiny_models.llama(1, 1)
    nameless.config.output_router_logits = True
    with pytest.raises(ValueError, match="has output_router_logits, but no router_aux_loss_coef"):
        tiny_models.trainer(tmp_path, student=nameless)
    student = tiny_models.llama(1, 1)
    student.config.z_loss_coefficient = 0.1  # Bamba's
    with pytest.raises(ValueError, match=r"z_loss_coefficient of 0\.1; .* name z_loss: 0\.1"):
        tiny_models.trainer(tmp_path, student=student)


REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"terms": "attention=1"}, "terms: attention"),
        ({"terms": "hidden=1,minilm=1"}, "terms: minilm"),
        ({"terms": "hidden=1", "balance": "gradient_norm"}, "balance: gradient_norm"),
        ({"student": "mixture"}, "output_router_logits"),
    ],
)
@pytest.mark.parametrize("enabled", ["arguments", "model", "model, afterwards"])
def test_reentrant_checkpointing_is_refused_where_it_hides_gradients(
    options: dict[str, Any], named: str, enabled: str, tmp_path: Path
) -> None:
    mixed = "student" in options
    student = mixture("Mixtral") if mixed else tiny_models.llama(1, 1)
    options = {k: v for k, v in options.items() if k != "student"}
    if enabled == "arguments":
        options |= REENTRANT
    if enabled == "model":
        student.gradient_checkpointing_enable({"use_reentrant": True})

    def run() -> None:
        trainer = tiny_models.trainer(tmp_path, student=student, **options)
        if enabled == "model, afterwards":
            student.gradient_checkpointing_enable({"use_reentrant": True})
        trainer.train()

    with pytest.raises(ValueError, match=f"use_reentrant=True leaves {named} without a gradient"):
        run()


@pytest.mark.parametrize("terms", [None, "hidden=1,embedding=1,sentence=1,gram=1"])
@pytest.mark.parametrize("kind", ["masked-lm", "token-classification"])
def test_what_reentrant_checkpointing_leaves_alone(
    terms: str | None, kind: str, tmp_path: Path
) -> None:
    trained = [
        tiny_berts.trainer(kind, tmp_path, terms=terms, **checkpointing)
        for checkpointing in ({}, REENTRANT)
    ]
    for trainer in trained:
        trainer.train()
    for a, b in zip(trained[0].model.parameters(), trained[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
