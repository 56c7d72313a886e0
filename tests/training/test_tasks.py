"""Every kind of model: one training step, its denominators, its data, its refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_berts
import tiny_models
import torch
from command_line import refused
from tiny_berts import CLASSES, Batches, bert, masking_tokenizer, trainer
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
)

from kdkernels.commands import data, geometry
from kdkernels.commands import main as cli
from kdkernels.training import tasks
from kdkernels.training.arguments import DistillationArguments
from kdkernels.training.trainer import DistillationTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread
assets = tiny_berts.assets


every_kind = pytest.mark.parametrize("kind", CLASSES)


@every_kind
def test_the_task_of_a_model(kind: str) -> None:
    assert tasks.task_of(bert(kind, 1, seed=1)).name == kind
    assert tasks.task_of(tiny_models.llama(1, seed=1)).name == "causal-lm"


@every_kind
def test_the_update_does_not_depend_on_how_a_batch_is_cut(kind: str, tmp_path: Path) -> None:
    whole = trainer(kind, tmp_path)
    cut = trainer(kind, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    before = [p.detach().clone() for p in whole.model.parameters()]
    whole.train()
    cut.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, whole.model.parameters(), strict=True))
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-6)
    names = ("loss", "kd_loss", "ce_loss", "agreement", "hidden_loss", "sentence_loss")
    logs = [[e for e in t.state.log_history if "loss" in e] for t in (whole, cut)]
    for ours, theirs in zip(*logs, strict=True):
        for name in set(names) & set(ours):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind != "encoder"])
def test_evaluation_is_the_formula_without_a_shift(kind: str, tmp_path: Path) -> None:
    trained = trainer(kind, tmp_path)
    batch = Batches(kind, 7)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    counted = batch.labels != -100
    with torch.no_grad():
        z_s, z_t = (
            m.eval()(**inputs).logits[counted].double() for m in (trained.model, trained.teacher)
        )
    labels = batch.labels[counted]
    log_p, log_q = (functional.log_softmax(z / 2, -1) for z in (z_t, z_s))
    kd = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ce = functional.cross_entropy(z_s, labels)
    want = {"kd_loss": kd, "ce_loss": ce, "loss": 0.7 * kd + 0.3 * ce}
    want["agreement"] = (z_s.argmax(-1) == z_t.argmax(-1)).double().mean()
    want["accuracy"] = (z_s.argmax(-1) == labels).double().mean()
    metrics = trained.evaluate()
    for name, value in want.items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(value), rel=1e-5), name
    assert ("eval_perplexity" in metrics) == (kind == "masked-lm")


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    trained = trainer("encoder", tmp_path)
    metrics = trained.evaluate()
    names = ("hidden", "embedding", "attention", "minilm", "sentence")
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{n}_loss"] for n in names))
    assert "eval_ce_loss" not in metrics and "eval_kd_loss" not in metrics
    with pytest.raises(ValueError, match="a model without a head needs at least one of hidden"):
        trainer("encoder", tmp_path, terms=None)
    with pytest.raises(ValueError, match="terms: response needs logits"):
        trainer("encoder", tmp_path, terms="hidden=1,response=1")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    args = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    student = bert("sequence-classification", 1, seed=1)
    with pytest.raises(ValueError, match=r"is for token-classification, model: .* for sequence"):
        DistillationTrainer(student, args, teacher=bert("token-classification", 2, seed=2))
    with pytest.raises(ValueError, match="teacher: 4 labels, the student has 3"):
        teacher = bert("sequence-classification", 2, seed=2, num_labels=4)
        DistillationTrainer(student, args, teacher=teacher)
    regression = bert("sequence-classification", 1, seed=1, num_labels=1)
    with pytest.raises(ValueError, match=r"model: 'bert' .* has 1 label"):
        DistillationTrainer(regression, args, teacher=student)
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        tasks.check_config(tasks.MASKED_LM, T5Config(), "teacher")
    with pytest.raises(ValueError, match=r"'llama' .* has no model for the task masked-lm"):
        tasks.check_config(tasks.MASKED_LM, tiny_models.llama(1, seed=1).config, "teacher")


def test_masked_blocks() -> None:
    tokenizer = masking_tokenizer()
    blocks = torch.randint(0, len(tokenizer), (50, 40), generator=torch.Generator().manual_seed(0))
    masked = data.MaskedBlocks(blocks, tokenizer, seed=1)
    chosen = masked.labels != -100
    special = torch.isin(blocks, torch.tensor(tokenizer.all_special_ids))
    assert not chosen[special].any() and torch.equal(masked.labels[chosen], blocks[chosen])
    assert 0.1 < chosen[~special].double().mean() < 0.2
    share = (masked.inputs[chosen] == tokenizer.mask_token_id).double().mean()
    assert 0.7 < share < 0.9 and torch.equal(masked.inputs[~chosen], blocks[~chosen])
    assert torch.equal(masked.inputs, data.MaskedBlocks(blocks, tokenizer, seed=1).inputs)


def test_a_student_that_diverges_is_reported_as_such(assets: Path, tmp_path: Path) -> None:
    changes = {"terms": "hidden=1", "learning_rate": 1e30, "baseline": "false"}
    assert cli.main(command(assets, "encoder", tmp_path / "out", **changes)) == 1
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][-1]
    for name in ("spearman", "pearson", "cosine", "neighbours"):
        assert row[name] is None  # NaN is no JSON
    assert (tmp_path / "out" / "geometry.png").exists()
    assert not (tmp_path / "out" / "student").exists()


def test_geometry() -> None:
    teacher = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    same = geometry.compare(3 * teacher, teacher)
    assert list(same.values()) == pytest.approx([1, 1, 1, 1])
    other = geometry.compare(torch.randn(20, 4), teacher)
    assert other["cosine"] is None and abs(other["spearman"]) < 0.6 and other["neighbours"] < 0.7
    cosines = [geometry.pairwise_cosines(v).numpy() for v in (teacher[:7, :4], teacher[:7])]
    assert len(cosines[0]) == 21
    want = numpy.corrcoef(*cosines)[0, 1]
    assert geometry.pearson(teacher[:7, :4], teacher[:7]) == pytest.approx(want)


# ---- names of labels ----------------------------------------------------------------------------

NAMES = ["entailment", "neutral", "contradiction"]


def named(kind: str, names: list[str], seed: int = 1) -> Any:
    ids = {name: i for i, name in enumerate(names)}
    return bert(kind, 1, seed=seed, label2id=ids, id2label={i: n for n, i in ids.items()})


CLASSIFIERS = pytest.mark.parametrize("kind", ["sequence-classification", "token-classification"])


@CLASSIFIERS
def test_labels_of_other_names_are_refused(kind: str, tmp_path: Path) -> None:
    teacher = named(kind, NAMES, seed=2)
    for names in (NAMES[::-1], ["entailment", "contradiction", "neutral"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=r"teacher: its label \d is '.*', the student's '"):
            trainer(kind, tmp_path, student=named(kind, names), teacher=teacher)
    for names in (NAMES, ["Entailment", " neutral", "CONTRADICTION"]):
        trainer(kind, tmp_path, student=named(kind, names), teacher=teacher)
    trainer(kind, tmp_path, student=bert(kind, 1, seed=1), teacher=teacher)  # only numbered
    trainer(kind, tmp_path, student=named(kind, ["0", "1", "2"]), teacher=teacher)


@CLASSIFIERS
def test_columns_that_number_labels_in_another_order_are_refused(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    student, teacher = named(kind, NAMES), named(kind, NAMES, seed=2)
    args = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)

    def data(names: list[str]) -> Any:
        label = datasets.ClassLabel(names=names)
        features = {"labels": label if kind == "sequence-classification" else [label]}
        labels: list[Any] = [0, 1] if kind == "sequence-classification" else [[0], [1]]
        return datasets.Dataset.from_dict({"labels": labels}, datasets.Features(features))

    for option in ("train_dataset", "eval_dataset"):
        with pytest.raises(
            ValueError, match=f"{option}: column 'labels' has label 0 for 'neutral'"
        ):
            swapped = {option: data(["neutral", "entailment", "contradiction"])}
            DistillationTrainer(student, args, teacher=teacher, **swapped)
        DistillationTrainer(student, args, teacher=teacher, **{option: data(NAMES)})
        own = {option: data(["yes", "perhaps", "no"])}
        DistillationTrainer(student, args, teacher=teacher, **own)


# ---- the command line ---------------------------------------------------------------------------


def command(assets: Path, kind: str, output: Path, **changes: Any) -> list[str]:
    text = "labelled.jsonl" if kind == "sequence-classification" else "lines.txt"
    chosen: dict[str, Any] = {
        "task": kind,
        "teacher": assets / kind,
        "student_layers": "1,3",
        "train_text": assets / text,
        "validation_fraction": 0.2,
        "sequence_length": 8,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "output_dir": output,
    } | changes
    return ["distill", *(f"--{k}={v}" for k, v in chosen.items() if v is not None)]


@pytest.mark.parametrize("kind", ["masked-lm", "sequence-classification", "encoder"])
def test_a_whole_run(kind: str, assets: Path, tmp_path: Path) -> None:
    terms = {"encoder": "hidden=1,rkd_distance=5", "masked-lm": "minilm=1"}.get(kind)
    assert cli.main(command(assets, kind, tmp_path / "out", terms=terms)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    baseline = "output only" if kind == "encoder" else "labels only"
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows)[2:] == [f"student, {baseline}", "student, distilled"]
    key = "spearman" if kind == "encoder" else "loss"
    assert math.isfinite(rows["student, distilled"][key])
    assert rows["student, distilled"][key] != rows[f"student, {baseline}"][key]
    loader = {"encoder": AutoModel, "sequence-classification": AutoModelForSequenceClassification}
    picture = tmp_path / "out" / "geometry.png"
    assert picture.exists() == (kind == "encoder")
    if kind == "encoder":
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert 'src="geometry.png"' in (tmp_path / "out" / "report.html").read_text()
        seen = rows["student, distilled"]["tokens_seen"]  # examples differ in length
        assert 0 < seen < 2 * 4 * 8 and seen == rows[f"student, {baseline}"]["tokens_seen"]
    model = loader.get(kind, BertForMaskedLM).from_pretrained(tmp_path / "out" / "student")
    assert model.config.num_hidden_layers == 2
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert tasks.TASKS[kind].auto_class.__name__ in card


def test_a_student_takes_the_names_of_its_teachers_labels(assets: Path, tmp_path: Path) -> None:
    kind = "sequence-classification"
    named(kind, NAMES, seed=2).save_pretrained(tmp_path / "teacher")
    masking_tokenizer().save_pretrained(tmp_path / "teacher")
    rows = [{"text": f"w{i % 9} w1", "label": NAMES[i % 3].upper()} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes: dict[str, Any] = {"student": assets / kind, "student_layers": None}
    changes |= {"teacher": tmp_path / "teacher", "train_text": tmp_path / "rows.jsonl"}
    assert cli.main(command(assets, kind, tmp_path / "out", baseline="false", **changes)) == 0
    config = json.loads((tmp_path / "out" / "student" / "config.json").read_text())
    assert [config["id2label"][str(i)] for i in range(3)] == NAMES
    assert config["label2id"] == {name: i for i, name in enumerate(NAMES)}


def test_a_run_without_labels(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kind = "sequence-classification"
    changes = {"alpha": 1, "train_text": assets / "lines.txt"}
    assert cli.main(command(assets, kind, tmp_path / "out", **changes)) == 0
    assert "train_text has no labels, so there is no baseline" in capfd.readouterr().err
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows][2:] == ["student, distilled"]
    for row in rows:
        assert {"divergence", "agreement"} <= row.keys() and not {"loss", "accuracy"} & row.keys()
    assert (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "sequence-classification",
            {"dataloader_drop_last": "true", "per_device_train_batch_size": 100},
            "dataloader_drop_last: 48 training examples are less than one batch of 100",
        ),
        (
            "sequence-classification",
            {"train_text": "lines.txt", "alpha_schedule": "linear:1:0.5"},
            "has no column 'label'",
        ),
        ("encoder", {"terms": None}, "terms: a model without a head needs at least one of"),
        ("encoder", {"task": "ner"}, "task: 'ner' is not one of causal-lm, masked-lm"),
        ("encoder", {"task": "causal-lm"}, "is not a decoder-only causal language model"),
        ("encoder", {"terms": "hidden=1", "layer_map": "1:9"}, "teacher layer 9 of pair 1:9"),
        ("masked-lm", {"teacher": "no-mask"}, "its tokenizer has no mask_token"),
        ("sequence-classification", {"train_text": "bad.jsonl"}, "label 7 is not one of the"),
        ("sequence-classification", {"train_text": "lines.txt"}, "has no column 'label'"),
        ("sequence-classification", {"teacher": "masked-lm"}, "lacks 2 weights of a BertForSeq"),
        ("sequence-classification", {"teacher": "one-label"}, "has 1 label(s)"),
        (
            "sequence-classification",
            {"student": "more-labels", "student_layers": None},
            "teacher: 3 labels, the student has 4",
        ),
        ("sequence-classification", {"label_column": "x"}, "label_column: 'x' is not a column"),
    ],
)
def test_bad_input_is_one_line(
    kind: str,
    changes: dict[str, Any],
    message: str,
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for option in ("teacher", "student", "train_text"):
        if option in changes:
            changes = changes | {option: assets / changes[option]}
    refused(command(assets, kind, tmp_path / "out", **changes), message, capfd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_text_longer_than_the_positions_of_roberta_is_refused(
    role: str, assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": tiny_models.VOCAB, "num_hidden_layers": 2, "pad_token_id": 1}
    for name, positions in (("teacher", 10 if role == "teacher" else 64), ("student", 10)):
        config = RobertaConfig(max_position_embeddings=positions, **sizes)
        RobertaForMaskedLM(config).save_pretrained(tmp_path / name)
        masking_tokenizer().save_pretrained(tmp_path / name)
    changes = {"teacher": tmp_path / "teacher", "student": tmp_path / "student"}
    changes |= {"student_layers": None, "max_steps": 1, "logging_steps": 1}
    message = f"sequence_length: 9 tokens are more than the 8 positions of {role}"
    too_long = command(assets, "masked-lm", tmp_path / "out", **changes, sequence_length=9)
    refused(too_long, message, capfd)
    assert not (tmp_path / "out").exists()
    fits = command(assets, "masked-lm", tmp_path / "out", **changes, sequence_length=8)
    assert cli.main(fits) == 0
