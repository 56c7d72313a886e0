"""Folders of sentence-transformers: what they say of pooling, and what students' folders say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_berts
import tiny_models
import torch
from command_line import refused
from tiny_berts import Batches, bert, trainer
from torch import Tensor
from transformers import AutoModel

from kdkernels.commands import init_student
from kdkernels.commands import main as cli
from kdkernels.losses.relations import gram_loss, pooled
from kdkernels.training import sentences
from kdkernels.training.arguments import DistillationArguments
from kdkernels.training.models import ModelSource
from kdkernels.training.sentences import Sentences

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread
assets = tiny_berts.assets


def modules(folder: Path, pooling: dict[str, Any], *others: str) -> Path:
    """Make ``folder`` one of sentence-transformers, with these modules behind the pooling."""
    kinds = ("Transformer", "Pooling", *others)
    listed = [
        {"idx": at, "name": str(at), "path": f"{at}_{kind}" if at else "", "type": f"a.b.{kind}"}
        for at, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def flags(*modes: str) -> dict[str, Any]:
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    names += ("weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 16} | {f"pooling_mode_{n}": n in modes for n in names}


def said(folder: Path) -> Sentences | None:
    return sentences.read(ModelSource("teacher", str(folder)))


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (flags("cls_token"), "cls"),
        (flags("mean_tokens"), "mean"),
        (flags("max_tokens"), "max"),
        (flags("mean_sqrt_len_tokens"), "mean_sqrt_len_tokens"),
        (flags("weightedmean_tokens"), "weightedmean"),
        (flags("lasttoken"), "lasttoken"),
        ({"embedding_dimension": 16, "pooling_mode": "cls"}, "cls"),
        ({"embedding_dimension": 16, "pooling_mode": ["max"]}, "max"),
        ({"word_embedding_dimension": 16}, "mean"),
    ],
)
def test_each_pooling_is_read_and_written(
    config: dict[str, Any], pooling: str, tmp_path: Path
) -> None:
    teacher = modules(tmp_path / "teacher", config, "Normalize")
    (teacher / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    assert said(teacher) == Sentences(pooling, True)
    student = tmp_path / "student"
    student.mkdir()
    source = ModelSource("teacher", str(teacher))
    sentences.write(student, Sentences(pooling, False), bert("encoder", 1, seed=1), source)
    assert said(student) == Sentences(pooling, False)
    written = json.loads((student / "1_Pooling" / "config.json").read_text())
    assert written["word_embedding_dimension"] == 16
    assert sum(written[key] for key in flags()) == 16 + 1
    assert (student / "sentence_bert_config.json").read_text() == '{"max_seq_length": 7}'


@pytest.mark.parametrize(
    ("pooling", "others", "problem"),
    [
        (flags("cls_token", "max_tokens"), (), "its pooling is cls beside max"),
        ({"pooling_mode": "attention"}, (), "its pooling is attention"),
        (flags("mean_tokens"), ("Dense", "Normalize"), "its vectors go through a Dense module"),
        (flags("mean_tokens"), ("LayerNorm",), "its vectors go through a LayerNorm module"),
    ],
)
def test_what_cannot_be_followed_is_refused_unless_a_pooling_is_given(
    pooling: dict[str, Any],
    others: tuple[str, ...],
    problem: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = ModelSource("teacher", str(modules(tmp_path, pooling, *others)))
    args = DistillationArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(ValueError, match=f"pooling: the folder of teacher .*: {problem}"):
        sentences.settle(source, None, args)
    args.pooling = "mean"
    sentences.settle(source, None, args)
    assert (args.pooling, args.normalize) == ("mean", "Normalize" in others)
    assert problem in caplog.text


@pytest.mark.parametrize(("given", "lines"), [("mean", 1), ("cls", 0), ("first", 0), (None, 0)])
def test_a_pooling_that_disagrees_with_a_folder_is_said(
    given: str | None, lines: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ModelSource("teacher", str(modules(tmp_path, flags("cls_token"))))
    args = DistillationArguments(output_dir=str(tmp_path / "out"), use_cpu=True, pooling=given)
    sentences.settle(source, source, args)
    assert args.pooling == (given or "cls")
    assert len(caplog.records) == 2 * lines  # of the teacher, and of the student
    assert ("says cls" in caplog.text) == bool(lines)


def test_without_such_a_folder_it_is_the_mean(tmp_path: Path) -> None:
    assert said(tmp_path) is None
    args = DistillationArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    sentences.settle(ModelSource("teacher", str(tmp_path)), None, args)
    assert (args.pooling, args.normalize) == ("mean", False)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]"])
def test_a_damaged_list_of_modules_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"teacher: .*modules\.json"):
        said(tmp_path)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_trainer_takes_the_vectors_of_the_teachers_folder(
    normalize: bool, tmp_path: Path
) -> None:
    bert("encoder", 2, seed=2).save_pretrained(tmp_path / "teacher")
    modules(tmp_path / "teacher", flags("max_tokens"), *(["Normalize"] if normalize else []))
    teacher = AutoModel.from_pretrained(tmp_path / "teacher")
    options = {"terms": "gram=1", "max_steps": 1, "per_device_train_batch_size": 8}
    trained = trainer("encoder", tmp_path / "out", teacher=teacher, **options)
    batch = Batches("encoder", 8)

    def vectors(model: Any) -> Tensor:
        hidden = model.eval()(batch.ids, attention_mask=batch.mask).last_hidden_state
        found = pooled(hidden, batch.mask.bool(), how="max")
        return found / found.norm(dim=-1, keepdim=True) if normalize else found

    with torch.no_grad():
        want = float(gram_loss(vectors(trained.model), vectors(teacher)))
    trained.train()
    logged = next(entry for entry in trained.state.log_history if "gram_loss" in entry)
    assert logged["gram_loss"] == pytest.approx(want, rel=1e-4)


def command(assets: Path, teacher: Path, output: Path, *more: str) -> list[str]:
    words = f"distill --task encoder --teacher {teacher} --train_text {assets / 'lines.txt'}"
    words += " --student_layers 1,3 --terms sentence=1 --sequence_length 8 --max_steps 1"
    words += " --save_strategy no --logging_steps 1 --use_cpu true --disable_tqdm true"
    return [*words.split(), "--baseline=false", f"--output_dir={output}", *more]


def test_a_run_follows_the_teachers_folder(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(assets / "encoder", teacher)
    modules(teacher, flags("cls_token"), "Normalize")
    assert cli.main(command(assets, teacher, tmp_path / "out")) == 0
    assert said(tmp_path / "out" / "student") == Sentences("cls", True)
    init_student.make_student(str(teacher), "uniform:2", tmp_path / "init", task="encoder")
    assert said(tmp_path / "init") == Sentences("cls", True)
    modules(teacher, flags("cls_token"), "Dense")
    message = "its vectors go through a Dense module; give one of mean, first, last, cls"
    refused(command(assets, teacher, tmp_path / "other"), message, capfd)
    assert not (tmp_path / "other").exists()
    init_student.make_student(str(teacher), "uniform:2", tmp_path / "again", task="encoder")
    assert said(tmp_path / "again") is None
