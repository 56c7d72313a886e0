"""Models in wrappers: adapters, torch.compile, a user's own; inputs that only one model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_berts
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kdkernels.training import tasks
from kdkernels.training.trainer import DistillationArguments, DistillationTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread

KIND = "sequence-classification"
PEFT_TASKS = {
    "masked-lm": None,
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "encoder": "FEATURE_EXTRACTION",
}


class Wrapper(nn.Module):
    """As users write them: hands everything on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def forward(self, **inputs: Any) -> Any:
        return self.wrapped(**inputs)


class Narrow(Wrapper):
    """Hands on what it names."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.wrapped(input_ids=input_ids, attention_mask=attention_mask)


class Derived(BertForSequenceClassification):
    pass


def lora(model: Any, kind: str = KIND, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        task_type=PEFT_TASKS[kind], r=2, target_modules=["query"], init_lora_weights=False
    )
    torch.manual_seed(3)
    return peft.get_peft_model(model, settings, **options)


def merged(model: Any) -> Any:
    adapted = lora(model)
    adapted.merge_adapter()
    return adapted


WRAPPERS: dict[str, Any] = {
    "adapter": lora,
    "merged adapter": merged,
    "mixed adapters": lambda model: lora(model, mixed=True),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled adapter": lambda model: torch.compile(lora(model), backend="eager"),
    "data parallel": nn.DataParallel,
    "a user's own": Wrapper,
    "a user's own with few arguments": Narrow,
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


def bert(layers: int, seed: int, **options: Any) -> Any:
    return tiny_berts.bert(KIND, layers, seed=seed, **options)


def divergence(teacher: Any, student: Any, inputs: dict[str, Any]) -> float:
    """T^2 KL(teacher, student) at T = 2, in float64: no kdkernels code."""
    with torch.no_grad():
        logits = [m.eval()(**i).logits.double() for m, i in zip((teacher, student), inputs)]  # noqa: B905
    log_p, log_q = ((z / 2).log_softmax(-1) for z in logits)
    return float(4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean())


@every_wrapper
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_wrapped_model_is_the_kind_it_wraps(wrapper: str, role: str, tmp_path: Path) -> None:
    models = {"student": bert(1, 1), "teacher": bert(2, 2)}
    models[role] = WRAPPERS[wrapper](models[role])
    assert tasks.task_of(models[role]).name == KIND
    trained = tiny_berts.trainer(KIND, tmp_path, max_steps=1, **models)
    batch = trained.eval_dataset
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    want = divergence(models["teacher"], models["student"], (inputs, inputs))
    assert trained.evaluate()["eval_kd_loss"] == pytest.approx(want, rel=1e-5)
    before = [p.detach().clone() for p in models["student"].parameters()]
    trained.train()
    after = models["student"].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("wrapper", ["adapter", "compiled", "compiled adapter", "data parallel"])
def test_a_wrapped_student_is_saved_under_its_own_names(wrapper: str, tmp_path: Path) -> None:
    """What is written is read by anybody, by a resumed training, and as the best model."""
    options: dict[str, Any] = {"max_steps": 3, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    for name in ("save", "eval"):
        options |= {f"{name}_strategy": "steps", f"{name}_steps": 1}

    def trainer(folder: str) -> DistillationTrainer:
        student = WRAPPERS[wrapper](bert(1, 1))
        return tiny_berts.trainer(KIND, tmp_path / folder, student=student, **options)

    trainer("whole").train()
    resumed = trainer("resumed")
    resumed.train(str(tmp_path / "whole" / "checkpoint-1"))
    weights = {file.parent: load_file(file) for file in tmp_path.glob("*/*/*model.safetensors")}
    assert len(weights) == 5
    inner = tasks.base_of(resumed.model)
    for folder, found in weights.items():
        assert_same(found, weights[tmp_path / "whole" / folder.name])
        if "adapter" not in wrapper:
            assert_same(found, type(inner).from_pretrained(folder).state_dict())
    best = Path(str(resumed.state.best_model_checkpoint))
    if "adapter" not in wrapper:
        assert_same(weights[best], inner.state_dict())
    assert resumed.evaluate()["eval_loss"] == pytest.approx(resumed.state.best_metric)


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("wrapper", ["adapter", "compiled", "a user's own"])
def test_the_terms_of_a_wrapped_student(wrapper: str, tmp_path: Path) -> None:
    """Its inside is seen: the terms are those of what it wraps, run as the wrapper runs it."""
    terms = {"terms": "hidden=1,attention=1,minilm=1,sentence=1", "learning_rate": 0.0}
    wrapped = tiny_berts.trainer(KIND, tmp_path, student=WRAPPERS[wrapper](bert(1, 1)), **terms)
    bare = lora(bert(1, 1)).merge_and_unload() if wrapper == "adapter" else bert(1, 1)
    plain = tiny_berts.trainer(KIND, tmp_path, student=bare, **terms)
    logs = []
    for trained in (wrapped, plain):
        trained.train()
        logs.append([e for e in trained.state.log_history if "loss" in e])
    for ours, theirs in zip(*logs, strict=True):
        for name in ("hidden_loss", "attention_loss", "minilm_loss", "sentence_loss", "kd_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize("kind", tiny_berts.CLASSES)
def test_adapters_on_models_of_every_kind(kind: str, tmp_path: Path) -> None:
    student = lora(tiny_berts.bert(kind, 1, seed=1), kind)
    teacher = lora(tiny_berts.bert(kind, 2, seed=2), kind)
    terms = {"terms": "sentence=1"} if kind == "encoder" else {}
    trained = tiny_berts.trainer(kind, tmp_path, student=student, teacher=teacher, **terms)
    assert trained.task.name == kind
    trained.train()
    assert "loss" in trained.state.log_history[0]


@pytest.mark.filterwarnings("ignore:.*quantize_dynamic.*", "ignore:.*torch.ao.*")
def test_a_quantised_teacher(tmp_path: Path) -> None:
    """Its linear maps are of another class, and their weights are packed."""
    quantised = torch.ao.quantization.quantize_dynamic(
        tiny_models.llama(2, seed=2), {nn.Linear}, dtype=torch.qint8
    )
    # Activations are quantised by the range of their batch: one that has all seven.
    options: dict[str, Any] = {"per_device_eval_batch_size": 7, "max_steps": 1}
    trained = tiny_models.trainer(tmp_path, quantised, terms="hidden=1,minilm=1", **options)
    ids = trained.eval_dataset.blocks
    counted = torch.stack([trained.eval_dataset[i]["labels"] for i in range(7)])[:, 1:] != -100
    with torch.no_grad():
        log_p, log_q = (
            (m.eval()(input_ids=ids).logits[:, :-1].double() / 2).log_softmax(-1)
            for m in (quantised, trained.model)
        )
    want = 4 * (log_p.exp() * (log_p - log_q)).sum(-1)[counted].mean()
    assert trained.evaluate()["eval_kd_loss"] == pytest.approx(float(want), rel=1e-5)
    trained.train()


def test_a_derived_class_is_the_kind_it_derives_from(tmp_path: Path) -> None:
    student = Derived(bert(1, 1).config)
    assert tasks.task_of(student).name == KIND
    tiny_berts.trainer(KIND, tmp_path, student=student).train()


def test_a_model_whose_configuration_asks_for_tuples(tmp_path: Path) -> None:
    for role in ("student", "teacher"):
        model = bert(1, 1, return_dict=False)
        metrics = tiny_berts.trainer(KIND, tmp_path, **{role: model}).evaluate()
        model.config.return_dict = True
        want = tiny_berts.trainer(KIND, tmp_path, **{role: model}).evaluate()
        assert metrics["eval_loss"] == want["eval_loss"]


def test_a_module_of_two_models_says_not_which(tmp_path: Path) -> None:
    towers = Wrapper(bert(1, 1))
    towers.other = bert(1, 2)
    with pytest.raises(ValueError, match=r"model: Wrapper holds 2 models \(BertForSeq"):
        tiny_berts.trainer(KIND, tmp_path, student=towers)


def test_what_a_wrapper_keeps_from_the_trainer_is_named(tmp_path: Path) -> None:
    class Bare(Wrapper):
        def forward(self, **inputs: Any) -> Any:
            return (self.wrapped(**inputs).logits,)

    for role in ("student", "teacher"):
        with pytest.raises(ValueError, match="gives no logits"):
            tiny_berts.trainer(KIND, tmp_path, **{role: Bare(bert(1, 1))}).train()
        with pytest.raises(ValueError, match="output_hidden_states is no argument of the forward"):
            narrow = {role: Narrow(bert(1, 1))}
            tiny_berts.trainer(KIND, tmp_path, terms="hidden=1", **narrow)


# ---- prompts that are learnt --------------------------------------------------------------------


def prompted(model: Any, how: str) -> Any:
    peft = pytest.importorskip("peft")
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    settings = {
        "prompt tuning": lambda: peft.PromptTuningConfig(**options),
        "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **options),
        "prefix tuning": lambda: peft.PrefixTuningConfig(**options),
    }[how]()
    torch.manual_seed(4)
    return peft.get_peft_model(model, settings)


every_prompt = pytest.mark.parametrize("how", ["prompt tuning", "p-tuning", "prefix tuning"])


@every_prompt
@pytest.mark.parametrize("fused_linear", ["true", "false"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_virtual_tokens_are_left_out(
    how: str, fused_linear: str, role: str, tmp_path: Path
) -> None:
    models = {"student": tiny_models.llama(1, 1), "teacher": tiny_models.llama(2, 2)}
    models[role] = prompted(models[role], how)
    terms = "hidden=1,minilm=1,sentence=1"
    trained = tiny_models.trainer(tmp_path, terms=terms, fused_linear=fused_linear, **models)
    ids, labels = (
        torch.stack([trained.eval_dataset[i][key] for i in range(7)])
        for key in ("input_ids", "labels")
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    counted = labels[:, 1:] != -100
    with torch.no_grad():
        log_p, log_q = (
            (m.eval()(**inputs).logits[:, -ids.shape[1] : -1].double() / 2).log_softmax(-1)
            for m in (models["teacher"], models["student"])
        )
    want = 4 * (log_p.exp() * (log_p - log_q)).sum(-1)[counted].mean()
    assert trained.evaluate()["eval_kd_loss"] == pytest.approx(float(want), rel=1e-5)
    assert trained.predict(trained.eval_dataset).predictions.shape == (*ids.shape, 17)
    trained.train()


@every_prompt
def test_attention_maps_of_virtual_tokens_are_refused(how: str, tmp_path: Path) -> None:
    student = prompted(tiny_models.llama(1, 1), how)
    with pytest.raises(
        ValueError, match=r"terms: attention: the student 'llama' .* learns a prompt"
    ):
        tiny_models.trainer(tmp_path, student=student, terms="attention=1")


# ---- each model's own inputs --------------------------------------------------------------------


def distilbert(seed: int) -> Any:
    torch.manual_seed(seed)
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=tiny_models.VOCAB,
            num_labels=tiny_berts.LABELS,
            dim=16,
            n_layers=1,
            n_heads=2,
            hidden_dim=32,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            pad_token_id=1,
            initializer_range=0.3,
        )
    )


def roberta(seed: int) -> Any:
    torch.manual_seed(seed)
    options = dict(bert(1, 1).config.to_dict(), num_hidden_layers=1, type_vocab_size=1)
    for name in ("model_type", "architectures"):
        options.pop(name)
    return RobertaForSequenceClassification(RobertaConfig(**options))


PAIRS = {
    "teacher with segments": (distilbert, bert),
    "student with segments": (bert, distilbert),
    "teacher of one segment": (bert, roberta),
    "student of one segment": (roberta, bert),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("loader", ["datasets", "list"])
def test_each_model_gets_its_own_inputs(pair: str, loader: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    student, teacher = (
        make(1, seed) if make is bert else make(seed) for seed, make in enumerate(PAIRS[pair])
    )
    rows = [
        {
            "input_ids": [2 + i, 8, 5, 9, 10, 5],
            "token_type_ids": [0, 0, 0, 1, 1, 1],
            "attention_mask": [1] * 6,
            "labels": i % 3,
            "unrelated": i,
        }
        for i in range(8)
    ]
    data: Any = datasets.Dataset.from_list(rows) if loader == "datasets" else rows
    arguments = DistillationArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        temperature=2.0,
        report_to="none",
        disable_tqdm=True,
    )
    trained = DistillationTrainer(student, arguments, teacher=teacher, eval_dataset=data)
    batch = {k: torch.tensor([r[k] for r in rows]) for k in ("input_ids", "attention_mask")}
    segments = torch.tensor([r["token_type_ids"] for r in rows])
    own = [
        batch | ({"token_type_ids": segments} if type(m) is type(bert(1, 1)) else {})
        for m in (teacher, student)
    ]
    want = divergence(teacher, student, own)
    assert trained.evaluate()["eval_kd_loss"] == pytest.approx(want, rel=1e-5)


def test_more_segments_than_a_model_has_are_named(tmp_path: Path) -> None:
    wide = bert(1, 1, type_vocab_size=3)
    trained = tiny_berts.trainer(KIND, tmp_path, student=wide)
    item = trained.train_dataset[0]
    batch = {name: value[None] for name, value in item.items()}
    batch["token_type_ids"] = torch.full_like(batch["input_ids"], 2)
    with pytest.raises(ValueError, match=r"token_type_ids: 2 in the batch, but 'bert' .* has 2"):
        trained.compute_loss(trained.model, batch)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(("family", "most"), [("bert", 64), ("roberta", 62)])
def test_more_tokens_than_a_model_has_positions_are_named(
    family: str, most: int, role: str, tmp_path: Path
) -> None:
    """RoBERTa's positions begin behind its padding token's id, which is 1 here."""
    models = {name: bert(1, 2, max_position_embeddings=128) for name in ("student", "teacher")}
    models[role] = bert(1, 1) if family == "bert" else roberta(1)
    trained = tiny_berts.trainer(KIND, tmp_path, **models)
    batch = {"labels": torch.tensor([0, 1])}
    trained.compute_loss(trained.model, batch | {"input_ids": torch.full((2, most), 7)})
    told = rf"input_ids: {most + 1} tokens in the batch, but '{family}' .* has {most} positions"
    with pytest.raises(ValueError, match=told):
        trained.compute_loss(trained.model, batch | {"input_ids": torch.full((2, most + 1), 7)})
