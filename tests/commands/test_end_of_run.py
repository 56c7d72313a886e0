"""The end of a run: rehearsed before it starts, weights first, and no report that loses them."""

from __future__ import annotations

import enum
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command_line
import pytest
import tiny_models
import torch
import yaml
from command_line import options, refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GenerationConfig

from kdkernels.commands import distill, report, speed
from kdkernels.commands import main as cli
from kdkernels.training.folders import content, on_trial, plain, write_json, written_whole
from kdkernels.training.saving import not_finite, repair_generation

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")
one_thread = tiny_models.one_thread
llama_assets = command_line.llama_assets

SHORT: dict[str, Any] = {"max_steps": 2, "baseline": "false"}


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SPEED_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_SPEED_ROUNDS", (3, 4))


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text(), parse_constant=no_constant)


def again(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """``function``, which raises ``error`` from its second call on: not in the rehearsal."""
    calls: list[None] = []

    def called(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) > 1:
            raise error
        return function(*arguments, **named)

    return called


# ---- generation configurations ------------------------------------------------------------------

UNSAVABLE: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    {"do_sample": False, "temperature": 0.0},
    {"early_stopping": True, "length_penalty": 2.0},
    {"output_scores": True},
    {"pad_token_id": -1},
    {"use_cache": False, "cache_implementation": "static"},
    {"num_return_sequences": 4},
    {"num_beams": 2, "num_return_sequences": 4},
    {"max_new_tokens": -1},
    {"early_stopping": "sometimes"},
    {"cache_implementation": "nobody's"},
    {"suppress_tokens": [1], "forced_eos_token_id": 1},
    {"logits_processor": "x"},
    {"temperature": 0.6, "max_new_tokens": 0, "num_return_sequences": 3, "output_attentions": True},
]


@pytest.mark.parametrize("settings", UNSAVABLE, ids=lambda settings: "-".join(settings))
def test_a_generation_configuration_is_mended(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.llama(1, seed=1)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="Fix these issues"):
        model.save_pretrained(tmp_path / "before")
    told = repair_generation(model)
    assert told is not None and told.startswith("generation_config: ") and "\n" not in told
    model.save_pretrained(tmp_path / "after")
    saved = GenerationConfig.from_pretrained(tmp_path / "after")
    assert saved.eos_token_id == 1
    assert repair_generation(model) is None


def test_a_generation_configuration_that_can_be_saved_stays() -> None:
    model = tiny_models.llama(1, seed=1)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    assert repair_generation(model) is None
    assert model.generation_config.temperature == 0.6
    assert repair_generation(BertModel(BertConfig(**TINY_BERT))) is None  # generates nothing


def chat_teacher(folder: Path) -> Path:
    teacher = tiny_models.save_model(folder / "chat", layers=2, seed=2)
    chat = {"eos_token_id": 1, "temperature": 0.6, "top_p": 0.95}  # and no pad_token_id
    (teacher / "generation_config.json").write_text(json.dumps(chat))
    return teacher


def test_checkpoints_of_a_chat_model(tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(chat_teacher(tmp_path))
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = tiny_models.trainer(tmp_path / "out", student=student, **saving)
    trainer.processing_class = tiny_models.tokenizer()  # its tokens go into the configuration
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").exists()


def test_layers_of_a_chat_model(tmp_path: Path) -> None:
    words = ["init-student", f"--teacher={chat_teacher(tmp_path)}", "--layers=0"]
    assert cli.main([*words, f"--output_dir={tmp_path / 'out'}"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")


# ---- what is refused, or mended, before training ------------------------------------------------

TINY_BERT: dict[str, Any] = {
    "vocab_size": tiny_models.VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and sentences."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY_BERT)).save_pretrained(folder / "teacher")
    tokenizer = tiny_models.tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(folder / "teacher")
    lines = [f"w{i % 13} w{i % 7} w{i % 5} w{i % 3}" for i in range(60)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "few.txt").write_text("\n".join(lines[:20]))
    return folder


ENCODER: dict[str, Any] = {"task": "encoder", "student_layers": "1", "terms": "sentence=1"}


@pytest.mark.parametrize(
    "changes",
    [
        {"logging_strategy": "no"},
        {"logging_steps": 500, "baseline": "true"},
        {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
        {"logging_steps": 2, "terms": "sentence=1,hidden=1"},
    ],
)
def test_an_encoder_with_few_points_or_none(
    changes: dict[str, Any], encoder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert cli.main(options(encoder, output, **(SHORT | ENCODER | changes))) == 0
    assert {path.name for path in content(output)} == {
        *report.RESULT_FILES,
        "student",
        "geometry.png",
    }
    assert results(output)["rows"][-1]["spearman"] is not None
    assert (output / "student" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_sentences_for_a_geometry(
    encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = SHORT | ENCODER | {"train_text": encoder / "few.txt"}
    refused(options(encoder, tmp_path / "out", **changes), "train_text: 1 held-out example", capfd)


def fails(*_: Any, **__: Any) -> None:
    raise NotImplementedError("this cannot be written")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("transformers.PreTrainedTokenizerBase", "save_pretrained"),
        ("transformers.PreTrainedModel", "save_pretrained"),
        ("kdkernels.commands.report", "model_card"),
        ("kdkernels.commands.report", "report"),
        ("kdkernels.commands.report", "plot"),
    ],
)
def test_what_cannot_be_written_is_refused_before_training(
    place: str,
    name: str,
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(f"{place}.{name}", fails)
    message = "NotImplementedError: this cannot be written"
    refused(options(llama_assets, tmp_path / "out", **SHORT), message, capfd)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_share_memory_are_refused_before_training(
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from kdkernels.commands import experiment

    build = experiment.build_student

    def shared(*arguments: Any) -> Any:
        student = build(*arguments)
        first, second = student.model.layers
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
        return student

    monkeypatch.setattr(experiment, "build_student", shared)
    refused(options(llama_assets, tmp_path / "out", **SHORT), "mlp.up_proj.weight", capfd)
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_needed_before_training(
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(options(llama_assets, tmp_path / "out", **SHORT), "loss.png: not drawn", capfd)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(options(llama_assets, tmp_path / "out", **SHORT), "1e-06 GB are free", capfd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_8bit"}, "optim, lr_scheduler_type: ImportError"),
        ({"optim": "adamw_torch", "adam_beta1": 2}, "Invalid beta parameter"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "optim, lr_scheduler_type: "),
        ({"lr_scheduler_kwargs": '{"nothing": 1}'}, "optim, lr_scheduler_type: TypeError"),
        ({"report_to": "wandb"}, "wandb"),
        ({"push_to_hub": "true"}, "push_to_hub: "),
        ({"eval_strategy": "steps", "metric_for_best_model": "f1"}, "metric_for_best_model: 'f1'"),
        (
            {"eval_strategy": "steps", "metric_for_best_model": "agreement", "baseline": "true"},
            "metric_for_best_model: 'agreement' is not one of loss, ce_loss, accuracy, perplexity",
        ),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": -2}, "dataloader: "),
        (
            {"dataloader_drop_last": "true", "per_device_train_batch_size": 1000},
            "training examples are less than one batch of 1000",
        ),
        ({"output_dir": "/proc/nothing"}, "/proc/nothing"),
        ({"output_dir": "{tmp}/" + "n" * 300}, "File name too long"),
        ({"output_dir": "{tmp}/new/" + "n" * 300 + "/x"}, "File name too long"),
    ],
)
def test_settings_that_end_a_run_are_refused_before_it(
    changes: dict[str, Any],
    message: str,
    llama_assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    filled = {k: v.format(tmp=tmp_path) if k == "output_dir" else v for k, v in changes.items()}
    refused(options(llama_assets, tmp_path / "out", **(SHORT | filled)), message, capfd)
    assert list(tmp_path.iterdir()) == []


# ---- the end itself -----------------------------------------------------------------------------


def test_names_that_are_not_ascii(llama_assets: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(llama_assets / "teacher", tmp_path / "Lehrer für 学生 | `x` {y}")
    output = tmp_path / "Ergebnis 結果"
    assert cli.main(options(llama_assets, output, teacher=teacher, **SHORT)) == 0
    assert "学生" in (output / "student" / "README.md").read_text(encoding="utf-8")
    assert "学生" in (output / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        (report, "plot", "loss.png: not drawn (RuntimeError: no more)"),
        (report, "report", "report.md: not written (RuntimeError: no more)"),
        (report, "model_card", "model card: not written (RuntimeError: no more)"),
    ],
)
def test_a_report_that_fails_loses_nothing_else(
    module: Any,
    name: str,
    told: str,
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    once = again(getattr(module, name), RuntimeError("no more"))
    if name == "report":  # it is a part of the page, too
        calls = iter([getattr(module, name)] * 2)
        monkeypatch.setattr(module, name, lambda *a: next(calls, fails_later)(*a))
    else:
        monkeypatch.setattr(module, name, once)
    output = tmp_path / "out"
    assert cli.main(options(llama_assets, output, **SHORT)) == 1
    errors = capfd.readouterr().err
    assert f"kdkernels distill: error: {told}\n" in errors and "Traceback" not in errors
    AutoModelForCausalLM.from_pretrained(output / "student")
    assert results(output)["rows"][-1]["loss"] > 0


def fails_later(*_: Any) -> None:
    raise RuntimeError("no more")


def test_an_evaluation_that_fails_loses_no_weights(
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    evaluate = distill.evaluate

    def failing(experiment: Any, title: str, model: Any) -> Any:
        if title == "student, distilled":
            raise RuntimeError("out of memory")
        return evaluate(experiment, title, model)

    monkeypatch.setattr(distill, "evaluate", failing)
    monkeypatch.setattr(distill, "forward_speeds", fails)
    output = tmp_path / "out"
    assert cli.main(options(llama_assets, output, **SHORT)) == 1
    errors = capfd.readouterr().err
    assert "student, distilled: not evaluated (RuntimeError: out of memory)" in errors
    assert "speeds: not measured (NotImplementedError" in errors
    assert results(output)["rows"][-1]["steps"] == 2
    assert {path.name for path in content(output)} == {*report.RESULT_FILES, "student"}
    AutoModelForCausalLM.from_pretrained(output / "student")


def test_a_run_that_is_stopped_after_training_keeps_the_student(
    llama_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "forward_speeds", stopped)
    output = tmp_path / "out"
    assert cli.main(options(llama_assets, output, **SHORT)) == 130
    AutoModelForCausalLM.from_pretrained(output / "student")
    assert results(output)["rows"][-1]["steps"] == 2


@pytest.mark.parametrize("changes", [{"learning_rate": 1e30}, {"learning_rate": 1e30, "fp16": 0}])
def test_a_run_that_diverges_says_so_and_saves_no_weights(
    changes: dict[str, Any],
    llama_assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    good = options(llama_assets, output, **SHORT)
    assert cli.main(good) == 0
    before = load_file(output / "student" / "model.safetensors")
    card = (output / "student" / "README.md").read_text()
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    again = options(llama_assets, output, overwrite_output_dir="true", **(SHORT | saving | changes))
    capfd.readouterr()
    assert cli.main(again) == 1
    errors = capfd.readouterr().err
    assert "its weights are not finite" in errors and "not saved, since" in errors
    assert "Traceback" not in errors
    after = load_file(output / "student" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (output / "student" / "README.md").read_text() == card
    assert results(output)["rows"][-1]["loss"] is None  # NaN is no JSON
    for path in output.rglob("model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


# ---- the parts ----------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Word(str, enum.Enum):
    STEPS = "steps"


def test_everything_that_options_hold_can_be_written(tmp_path: Path) -> None:
    given = {
        "enum": Colour.RED,
        "word": Word.STEPS,
        "path": Path("a") / "b",
        "tuple": (1, 2.5),
        "set": {3},
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "tensor": torch.tensor([1.0, math.nan]),
        "nested": {Word.STEPS: [Path("c"), {"x": math.inf}]},
        "nan": math.nan,
        "numbers": [True, None, 7, -math.inf],
        7: "seven",
    }
    wanted = {
        "enum": "red",
        "word": "steps",
        "path": "a/b",
        "tuple": [1, 2.5],
        "set": [3],
        "dtype": "bfloat16",
        "device": "cpu",
        "tensor": [1.0, None],
        "nested": {"steps": ["c", {"x": None}]},
        "nan": None,
        "numbers": [True, None, 7, None],
        "7": "seven",
    }
    assert plain(given) == wanted
    assert yaml.safe_load(yaml.safe_dump(plain(given))) == wanted
    write_json(tmp_path / "x.json", given)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=no_constant) == wanted


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, 1.0])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_any_curve_can_be_plotted(value: float | None, length: int, tmp_path: Path) -> None:
    names = ("teacher", "student, untrained", "student, labels only", "student, distilled")
    held_out = math.nan if value is None else value
    rows = [{"name": name, "loss": held_out, "divergence": held_out} for name in names]
    log = [
        {
            "step": step,
            "ce_loss": value,
            "kd_loss": value,
            "hidden_loss": value,
            "eval_ce_loss": value,
        }
        for step in range(1, length + 1)
    ]
    curves = {"labels only": [{"step": 2}][:length], "distilled": log}
    report.plot({"rows": rows, "curves": curves}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_the_first_weight_that_is_not_finite_is_named() -> None:
    model = tiny_models.llama(2, seed=1)
    assert not_finite(model) is None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    assert not_finite(model) == "model.layers.1.mlp.up_proj.weight"


def test_a_folder_is_the_old_one_or_the_whole_new_one(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError), written_whole(target) as new:
        (new / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with written_whole(target) as new:
            (new / text).write_text("")
        assert [path.name for path in target.iterdir()] == [text]
    with pytest.raises(KeyboardInterrupt), written_whole(target) as new:
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in target.parent.iterdir()] == ["b"]
    empty = tmp_path / "empty"
    empty.mkdir()
    there = empty.stat().st_ino  # it may be where a disk is mounted
    with written_whole(empty) as new:
        (new / "x").write_text("")
    assert [path.name for path in empty.iterdir()] == ["x"] and empty.stat().st_ino == there
    assert empty.stat().st_mode == target.stat().st_mode


def test_a_trial_leaves_nothing(tmp_path: Path) -> None:
    with on_trial(tmp_path / "a" / "b") as scratch:
        (scratch / "x").write_text("")
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(OSError, match=r"Not a directory|File exists"),
        on_trial(Path(__file__) / "x"),
    ):
        pass
