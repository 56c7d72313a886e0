"""What one training must not leave to the next one, and what an evaluation sees of the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_berts
import tiny_models
import torch
from transformers import TrainerCallback

from kdkernels.training.trainer import DistillationArguments, DistillationTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread


class Stop(TrainerCallback):
    """Interrupts the first training after its third update."""

    seen = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
        if self.seen == 3:
            raise KeyboardInterrupt


class TooLarge(DistillationTrainer):
    """Runs out of memory at its second micro-batch."""

    calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        result = super().compute_loss(*args, **kwargs)
        if self.calls == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return result


def trained_again(how: str, output: Path, **options: Any) -> DistillationTrainer:
    options |= {"max_steps": 5, "logging_steps": 2}
    trainer = tiny_models.trainer(output, **options)
    if how == "interrupted":
        trainer.add_callback(Stop())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    elif how == "too large":
        trainer.__class__ = TooLarge
        trainer.args.auto_find_batch_size = True
    elif how == "evaluated in between":
        trainer.train()
        trainer.evaluate()
    else:
        trainer.train()
    trainer.train()
    return trainer


@pytest.mark.parametrize("how", ["finished", "interrupted", "too large", "evaluated in between"])
@pytest.mark.parametrize("terms", [None, "hidden=0.5,sentence=2"])
def test_the_log_is_of_this_training_alone(how: str, terms: str | None, tmp_path: Path) -> None:
    trainer = trained_again(how, tmp_path, terms=terms)
    logged = [e for e in trainer.state.log_history if "kd_loss" in e]
    assert len(logged) == 2
    for entry in logged:
        parts = 0.7 * entry["kd_loss"] + 0.3 * entry["ce_loss"]
        if terms is not None:
            parts += 0.5 * entry["hidden_loss"] + 2 * entry["sentence_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
        assert 0 <= entry["accuracy"] <= 1 and 0 <= entry["agreement"] <= 1


def test_every_trial_has_a_student_and_settings_of_its_own(tmp_path: Path) -> None:
    """``model_init`` makes a student for each training: nothing is held to the one before it."""
    layers = iter((1, 1, 2, 3))  # the constructor takes the first one

    def make() -> Any:
        return tiny_models.llama(next(layers), seed=1)

    settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 12}
    settings |= {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "optim": "sgd"}
    settings |= {"disable_tqdm": True, "report_to": "none", "lr_scheduler_type": "constant"}
    settings |= {"terms": "hidden=1,minilm=1", "alpha": 0.7, "learning_rate": 0.5}
    data = tiny_models.dataset(12)

    def trainer(**changes: Any) -> DistillationTrainer:
        return DistillationTrainer(
            args=DistillationArguments(output_dir=str(tmp_path), **settings | changes),
            teacher=tiny_models.llama(3, seed=2),
            train_dataset=data,
            **({"model_init": make} if not changes else {"model": make()}),
        )

    many = trainer()
    histories = []
    for temperature, alpha in ((1.0, 0.2), (3.0, 0.9)):
        many.args.temperature, many.args.alpha = temperature, alpha
        many.train()
        histories.append([e for e in many.state.log_history if "kd_loss" in e])
    assert many.terms is not None and len(many.terms.pairs) == 2
    layers = iter((2,))
    alone = trainer(temperature=3.0, alpha=0.9)
    alone.train()
    want = [e for e in alone.state.log_history if "kd_loss" in e]
    for ours, theirs in zip(histories[1], want, strict=True):
        for name in ("loss", "kd_loss", "ce_loss", "hidden_loss", "minilm_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_arguments_are_read_when_a_training_starts(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, alpha=0.9)
    trainer.args.alpha = 0.0
    trainer.train()
    logged = next(e for e in trainer.state.log_history if "loss" in e)
    assert logged["loss"] == pytest.approx(logged["ce_loss"]) and "kd_loss" not in logged


# ---- what an evaluation sees --------------------------------------------------------------------


def test_an_evaluation_drops_no_example(tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_eval_batch_size": 4}  # of 7 examples
    whole = tiny_models.trainer(tmp_path, **options)
    dropping = tiny_models.trainer(tmp_path, dataloader_drop_last=True, **options)
    want, metrics = whole.evaluate(), dropping.evaluate()
    assert metrics["eval_loss"] == want["eval_loss"]
    assert len(dropping.predict(dropping.eval_dataset).predictions) == 7
    dropping.args.per_device_eval_batch_size = 50
    assert dropping.evaluate()["eval_ce_loss"] == pytest.approx(want["eval_ce_loss"])
    assert dropping.args.dataloader_drop_last
    assert len(dropping.get_train_dataloader()) == 3


class Unlabelled(torch.utils.data.Dataset):
    def __init__(self, labelled: Any) -> None:
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {k: v for k, v in self.labelled[index].items() if k != "labels"}


KINDS = [kind for kind in tiny_berts.CLASSES if kind != "encoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_one_needs_no_labels(kind: str, tmp_path: Path) -> None:
    """Every token that is no padding counts, or every example; in an update cut in two as well."""
    trainer = tiny_berts.trainer(
        kind, tmp_path, alpha=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    data = trainer.eval_dataset
    inputs = {"input_ids": data.ids, "attention_mask": data.mask}
    with torch.no_grad():
        log_p, log_q = (
            (m.eval()(**inputs).logits.double() / 2).log_softmax(-1)
            for m in (trainer.teacher, trainer.model)
        )
    rows = 4 * (log_p.exp() * (log_p - log_q)).sum(-1)
    want = rows.mean() if kind == "sequence-classification" else rows[data.mask.bool()].mean()
    metrics = trainer.evaluate(Unlabelled(data))
    assert metrics["eval_kd_loss"] == pytest.approx(float(want), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_kd_loss"], rel=1e-6)
    assert not {"eval_ce_loss", "eval_accuracy", "eval_perplexity"} & set(metrics)
    trainer.train_dataset = Unlabelled(trainer.train_dataset)
    trainer.train()
    logged = next(e for e in trainer.state.log_history if "loss" in e)
    assert logged["loss"] == pytest.approx(logged["kd_loss"], rel=1e-5)
    assert 0 <= logged["agreement"] <= 1 and "ce_loss" not in logged and "accuracy" not in logged


def test_text_of_a_causal_model_is_its_own_label(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, alpha=1.0)
    blocks = tiny_models.TokenBlocks(trainer.eval_dataset.blocks)
    ours, theirs = trainer.evaluate(Unlabelled(blocks)), trainer.evaluate(blocks)
    for name in ("eval_loss", "eval_kd_loss", "eval_ce_loss", "eval_accuracy"):
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_predictions_need_no_labels(kind: str, alpha: float, tmp_path: Path) -> None:
    trainer = tiny_berts.trainer(kind, tmp_path, alpha=alpha)
    found = trainer.predict(Unlabelled(trainer.eval_dataset))
    want = trainer.predict(trainer.eval_dataset)
    assert (found.predictions == want.predictions).all() and found.label_ids is None
    assert "test_loss" not in found.metrics and "test_ce_loss" not in found.metrics
    assert ("test_kd_loss" in found.metrics) == (alpha > 0)
    if alpha:
        assert math.isfinite(found.metrics["test_kd_loss"])


def test_labels_are_needed_where_alpha_is_not_always_one(tmp_path: Path) -> None:
    for options in ({"alpha": 0.7}, {"alpha_schedule": "linear:1:0.5"}, {"alpha": 0.0}):
        trainer = tiny_berts.trainer("sequence-classification", tmp_path, **options)
        trainer.train_dataset = Unlabelled(trainer.train_dataset)
        with pytest.raises(ValueError, match=r"labels: missing in the batch .* unless alpha is 1"):
            trainer.train()
