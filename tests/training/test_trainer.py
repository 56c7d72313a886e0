"""DistillationTrainer: what an update is, what is logged, what is saved, what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import cases
import pytest
import tiny_models
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, TrainingArguments

from kdkernels import divergences
from kdkernels.training.trainer import DistillationArguments, DistillationTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread

TEMPERATURE, ALPHA = 2.0, 0.7


def parameters(trainer: DistillationTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_parameters(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-5, atol=2e-6)


def expected(student: Any, teacher: Any, data: tiny_models.MaskedBlocks) -> dict[str, float]:
    """The numbers of one batch in plain float64 formulas: no kdkernels code."""
    items = [data[i] for i in range(len(data))]
    ids, labels = (torch.stack([item[key] for item in items]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        z_s, z_t = (m.eval()(input_ids=ids).logits[:, :-1].double() for m in (student, teacher))
    labels = labels[:, 1:]
    counted = labels != -100
    log_p, log_q = (functional.log_softmax(z / TEMPERATURE, -1) for z in (z_t, z_s))
    kd = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1)[counted].mean()
    ce = functional.cross_entropy(z_s[counted], labels[counted])
    return {
        "loss": float(ALPHA * kd + (1 - ALPHA) * ce),
        "kd_loss": float(kd),
        "ce_loss": float(ce),
        "accuracy": float((z_s.argmax(-1) == labels)[counted].double().mean()),
        "agreement": float((z_s.argmax(-1) == z_t.argmax(-1))[counted].double().mean()),
    }


def training_logs(trainer: DistillationTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_the_update_does_not_depend_on_how_a_batch_is_cut(tmp_path: Path) -> None:
    whole = tiny_models.trainer(tmp_path)
    cut = tiny_models.trainer(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    before = parameters(whole)
    whole.train()
    cut.train()
    assert any(not torch.equal(before[k], v) for k, v in parameters(whole).items())
    assert_same_parameters(parameters(whole), parameters(cut))
    for a, b in zip(training_logs(whole), training_logs(cut), strict=True):
        for name in ("loss", "kd_loss", "ce_loss", "agreement", "accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_two_processes_give_the_update_and_the_metrics_of_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("train_two_processes.py")
    tiny_models.two_processes(str(script), str(tmp_path))
    two = torch.load(tmp_path / "result.pt", weights_only=True)
    one = tiny_models.trainer(tmp_path)
    one.train()
    assert_same_parameters(parameters(one), two["model"])
    for a, b in zip(training_logs(one), two["logs"], strict=True):
        for name in ("loss", "kd_loss", "ce_loss", "agreement", "accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    metrics = one.evaluate()  # 7 examples in batches of 2 x 2: the last one is filled up
    for name in ("eval_loss", "eval_kd_loss", "eval_ce_loss", "eval_agreement", "eval_accuracy"):
        assert metrics[name] == pytest.approx(two["metrics"][name], rel=1e-5), name


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 7}
    options |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    through = tiny_models.trainer(tmp_path / "through", **options)
    through.train()
    resumed = tiny_models.trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-4"))
    for (name, a), b in zip(
        through.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    names = ("step", "loss", "kd_loss", "ce_loss")
    tails = [[{n: e[n] for n in names} for e in training_logs(t)] for t in (through, resumed)]
    assert tails[0] == tails[1]
    checkpoint = tmp_path / "through" / "checkpoint-4"
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as saved:
        assert not [name for name in saved.keys() if ".layers.1." in name]  # noqa: SIM118


def test_logs_are_the_formula(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, per_device_train_batch_size=12, max_steps=1)
    want = expected(
        tiny_models.llama(1, seed=1), tiny_models.llama(2, seed=2), trainer.train_dataset
    )
    trainer.train()
    (logged,) = training_logs(trainer)
    for name, value in want.items():
        assert logged[name] == pytest.approx(value, rel=1e-5), name


def test_logs_are_means_over_the_logging_steps(tmp_path: Path) -> None:
    single = tiny_models.trainer(tmp_path, max_steps=6)
    paired = tiny_models.trainer(tmp_path, max_steps=6, logging_steps=3)
    single.train()
    paired.train()
    each, both = training_logs(single), training_logs(paired)
    assert len(both) == 2
    for name in ("loss", "kd_loss", "ce_loss", "agreement"):
        for i, logged in enumerate(both):
            mean = sum(entry[name] for entry in each[3 * i : 3 * i + 3]) / 3
            assert logged[name] == pytest.approx(mean, rel=1e-5), name


def test_evaluation_averages_over_tokens(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, label_smoothing_factor=0.1)
    want = expected(trainer.model, trainer.teacher, trainer.eval_dataset)
    metrics = trainer.evaluate()
    for name, value in want.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(want["ce_loss"]), rel=1e-5)


def test_compute_metrics_gets_logits_and_labels(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path)
    trainer.compute_metrics = lambda p: {"width": p.predictions.shape[-1], "n": len(p.label_ids)}
    metrics = trainer.evaluate()
    assert (metrics["eval_width"], metrics["eval_n"]) == (tiny_models.VOCAB, 7)


def test_alpha_zero_does_not_run_the_teacher(tmp_path: Path) -> None:
    teacher = tiny_models.llama(2, seed=2)
    teacher.forward = None  # calling it fails
    with_teacher = tiny_models.trainer(tmp_path, alpha=0.0)
    with_teacher.teacher = teacher
    without = tiny_models.trainer(tmp_path, teacher=None, alpha=0.0)
    for trainer in (with_teacher, without):
        trainer.train()
        logged = training_logs(trainer)[-1]
        assert logged["loss"] == pytest.approx(logged["ce_loss"])
        assert "kd_loss" not in logged and "agreement" not in logged
        assert "eval_kd_loss" not in trainer.evaluate()
    assert_same_parameters(parameters(with_teacher), parameters(without))


def test_alpha_one_is_the_teacher_alone(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, alpha=1.0)
    trainer.train()
    logged = training_logs(trainer)[0]
    assert logged["loss"] == pytest.approx(logged["kd_loss"]) != logged["ce_loss"]


def test_the_teacher_stays_as_it_was(tmp_path: Path) -> None:
    teacher = tiny_models.llama(2, seed=2).train()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    trainer = tiny_models.trainer(tmp_path, teacher=teacher, teacher_dtype="bfloat16")
    trainer.train()
    assert not teacher.training
    for name, parameter in teacher.named_parameters():
        assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
        assert torch.equal(parameter, before[name].bfloat16())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.model.parameters()}


def test_an_update_without_labels_changes_nothing(tmp_path: Path) -> None:
    class Unlabelled(tiny_models.TokenBlocks):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            item = super().__getitem__(index)
            return item | {"labels": torch.full_like(item["labels"], -100)}

    trainer = tiny_models.trainer(tmp_path)
    trainer.train_dataset = Unlabelled(tiny_models.dataset(12).blocks)
    before = parameters(trainer)
    trainer.train()
    assert all(torch.equal(before[name], p) for name, p in parameters(trainer).items())
    assert training_logs(trainer)[-1]["loss"] == 0


@pytest.mark.parametrize("name", cases.BUILT_IN)
def test_every_divergence_trains(name: str, tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, divergence=name, max_steps=1)
    trainer.train()
    assert math.isfinite(training_logs(trainer)[0]["kd_loss"])


def test_divergence_parameters_are_used(tmp_path: Path) -> None:
    arguments = DistillationArguments(
        output_dir=str(tmp_path), divergence="alpha_beta", divergence_parameters=[0.5, 0.25]
    )
    assert arguments.resolved_divergence() == divergences.AlphaBeta(0.5, 0.25)


def test_vocabularies_of_different_size_can_be_truncated(tmp_path: Path) -> None:
    wide = tiny_models.llama(2, seed=2, vocab=tiny_models.VOCAB + 3)
    trainer = tiny_models.trainer(tmp_path, teacher=wide, vocab_policy="truncate")
    trainer.train()
    assert math.isfinite(training_logs(trainer)[-1]["kd_loss"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("alpha", 1.5),
        ("alpha", -0.1),
        ("z_loss", -1.0),
        ("label_smoothing_factor", 1.0),
        ("divergence", "forward"),
        ("beta", 2.0),
        ("divergence_parameters", [0.1, 0.2]),
        ("vocab_policy", "pad"),
        ("teacher_dtype", "float8"),
        ("teacher_device", "meta"),
        ("teacher_device", "cpu:1"),
        ("teacher_device", "gpu"),
    ],
)
def test_bad_arguments_are_named(option: str, value: Any, tmp_path: Path) -> None:
    extra = {"divergence": "jsd"} if option == "beta" else {}
    with pytest.raises(ValueError, match=option) as caught:
        DistillationArguments(output_dir=str(tmp_path), **{option: value}, **extra)
    assert str(value) in str(caught.value)


def test_the_teacher_may_have_a_device_of_its_own(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, teacher_device="cpu")
    trainer.train()
    assert {p.device.type for p in trainer.teacher.parameters()} == {"cpu"}
    assert math.isfinite(training_logs(trainer)[-1]["kd_loss"])


def test_what_the_trainer_refuses(tmp_path: Path) -> None:
    args = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    student, teacher = tiny_models.llama(1, seed=1), tiny_models.llama(2, seed=2)
    bert = BertForMaskedLM(
        BertConfig(vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(TypeError, match="TrainingArguments is not a DistillationArguments"):
        DistillationTrainer(student, TrainingArguments(str(tmp_path)), teacher=teacher)
    with pytest.raises(ValueError, match=r"teacher: None, but alpha = 0\.5"):
        DistillationTrainer(student, args)
    with pytest.raises(ValueError, match="vocabulary of 70, the student's has 17"):
        DistillationTrainer(student, args, teacher=tiny_models.llama(2, seed=2, vocab=70))
    with pytest.raises(ValueError, match="shares parameters"):
        DistillationTrainer(student, args, teacher=student)
    with pytest.raises(ValueError, match="model: 'bert'"):
        DistillationTrainer(bert, args, teacher=teacher)
    with pytest.raises(ValueError, match="teacher: 'bert'"):
        DistillationTrainer(student, args, teacher=bert)
    with pytest.raises(ValueError, match="compute_loss_func"):
        DistillationTrainer(student, args, teacher=teacher, compute_loss_func=lambda *a: None)
    swapped = tiny_models.tokenizer([*tiny_models.WORDS[1:], tiny_models.WORDS[0]])
    with pytest.raises(ValueError, match="tokenizers differ: token 'w0' is id 2"):
        DistillationTrainer(
            student,
            args,
            teacher=teacher,
            processing_class=tiny_models.tokenizer(),
            teacher_processing_class=swapped,
        )


def test_a_batch_without_labels_is_refused(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path)
    with pytest.raises(ValueError, match="labels: missing in the batch"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})


#: Options that the base class takes and nothing reads: what they need, or why not.
IDLE: list[tuple[dict[str, Any], str]] = [
    ({"label_names": ["start_positions"]}, "label_names"),
    ({"label_names": ["labels", "more"]}, "label_names"),
    ({"include_for_metrics": ["loss", "inputs"]}, "include_for_metrics"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "needs .*checkpointing"),
    ({"activation_checkpointing_kwargs": {"use_reentrant": False}}, "needs .*checkpointing"),
    ({"liger_kernel_config": {"rope": True}}, "needs use_liger_kernel"),
    ({"length_column_name": "size"}, "needs train_sampling_strategy group_by_length"),
    ({"optim_target_modules": ["q_proj"]}, "optim_target_modules.* needs a GaLore"),
    ({"optim_args": "foo=1"}, "optim_args: 'foo' has no effect on adamw_torch_fused"),
    ({"optim": "sgd", "optim_args": "momentum=0.9, betas=1"}, "'betas' has no effect on sgd"),
    ({"greater_is_better": True}, "greater_is_better: True .* needs metric_for_best_model"),
    ({"divergence": "jsd", "beta": 0.3, "divergence_parameters": [0.7]}, "beta: 0.3 has no effect"),
]


@pytest.mark.parametrize(("options", "message"), IDLE)
def test_an_option_that_nothing_reads_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"label_names": ["labels"]},
        {"include_for_metrics": ["inputs"]},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"train_sampling_strategy": "group_by_length", "length_column_name": "size"},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"},
        {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": "rank=4"},
        {"metric_for_best_model": "ce_loss", "greater_is_better": False},
        {"alpha_schedule": "linear:1:0.75", "temperature_schedule": "linear:4:2"},
    ],
)
def test_an_option_beside_what_it_needs_is_taken_twice(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """A copy is checked once more, with what the first check has put in."""
    arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, **options)
    dataclasses.replace(arguments, seed=3)


def test_a_watch_of_overflows_sees_whole_logits(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, debug="underflow_overflow")
    assert trainer._heads.reasons["student"] == "debug looks at the logits"
    trainer.train()
    same = tiny_models.trainer(tmp_path)
    same.train()
    for one, other in zip(training_logs(trainer), training_logs(same), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
