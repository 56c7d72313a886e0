"""Nothing of the user's is lost or told: what a run reads, other people's files, secrets."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import command_line
import pytest
import tiny_models
import torch
import yaml
from command_line import options, refused

from kdkernels.commands import distill, speed
from kdkernels.commands import main as cli
from kdkernels.training.redaction import is_secret, redacted, without_secrets

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")
one_thread = tiny_models.one_thread
llama_assets = command_line.llama_assets

SHORT: dict[str, Any] = {"max_steps": 2, "baseline": "false"}
SECRET = "hf_SECRETSECRET"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SPEED_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_SPEED_ROUNDS", (3, 4))


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(llama_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of a run, checkpoints among them."""
    output = tmp_path_factory.mktemp("finished") / "out"
    saving = {"save_strategy": "steps", "save_steps": 2}
    assert cli.main(options(llama_assets, output, **SHORT, **saving)) == 0
    return output


@pytest.fixture
def place(finished: Path, llama_assets: Path, tmp_path: Path) -> Path:
    """A copy of it in ``out``, with links and texts that lie in places of all kinds."""
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out" / "student")
    (tmp_path / "linked").symlink_to(tmp_path / "out")
    shutil.copy(llama_assets / "text.txt", tmp_path / "out" / "student" / "text.txt")
    return tmp_path


# ---- --overwrite_output_dir ---------------------------------------------------------------------

NO_LAYERS = {"student_layers": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"student": "{place}/out/student"} | NO_LAYERS,
        {"student": "{place}/out/../out/student/"} | NO_LAYERS,
        {"student": "out/student"} | NO_LAYERS,
        {"student": "./linked/student"} | NO_LAYERS,
        {"student": "{place}/link"} | NO_LAYERS,
        {"student": "{place}/out/distilled/checkpoint-2"} | NO_LAYERS,
        {"student_config": "{place}/out/student/config.json"} | NO_LAYERS,
        {"teacher": "{place}/out/student"},
        {"teacher": "{place}/link", "output_dir": "{place}/linked"},
        {"train_text": "{place}/out/student/text.txt"},
        {"train_text": "{place}/link/text.txt"},
        {"train_text": "{place}/out/student"},
        {"train_text": "{place}"},
        {"train_text": "."},
        {"validation_text": "{place}/out/results.json"},
        {"validation_text": "{place}/out/report.md"},
        {"teacher_cache": "{place}/out/student", "student": "x"} | NO_LAYERS,
        {"deepspeed": "{place}/out/student/config.json"},
    ],
)
def test_what_a_run_reads_is_not_replaced(
    changes: dict[str, Any],
    llama_assets: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = tree(place)
    filled = {k: v.format(place=place) if v else v for k, v in changes.items()}
    words = options(llama_assets, place / "out", **(SHORT | filled), overwrite_output_dir="true")
    try:
        refused(words, "would be replaced", capfd)
    except AssertionError:  # DeepSpeed is not installed: refused, before anything
        assert "deepspeed" in changes
    assert tree(place) == before


def test_a_configuration_file_is_an_input(
    llama_assets: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = place / "out" / "student" / "run.yaml"
    config.write_text("max_steps: 2\n")
    words = options(llama_assets, place / "out", overwrite_output_dir="true")[1:]
    refused(["distill", str(config), *words], "and config needs", capfd)
    assert config.exists()


def test_a_resumed_run_does_not_replace_its_student(
    llama_assets: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = SHORT | NO_LAYERS | {"student": place / "out" / "student"}
    words = options(llama_assets, place / "out", **changes, resume_from_checkpoint="true")
    refused(words, "would be replaced", capfd)


def somebodys(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")


def model_of_somebody(folder: Path) -> None:
    tiny_models.save_model(folder / "student", layers=1, seed=1)


def notes_of_somebody(folder: Path) -> None:
    folder.mkdir()
    (folder / "results.json").write_text('{"mine": 1}')
    (folder / "report.md").write_text("mine")


def checkpoints_and_more(folder: Path) -> None:
    (folder / "distilled" / "checkpoint-2").mkdir(parents=True)
    (folder / "distilled" / "notes.txt").write_text("mine")


def linked_student(folder: Path) -> None:
    somebodys(folder.parent / "elsewhere")
    folder.mkdir()
    (folder / "results.json").write_text('{"rows": [], "configuration": {}}')
    (folder / "student").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    "make",
    [somebodys, model_of_somebody, notes_of_somebody, checkpoints_and_more, linked_student],
)
def test_a_folder_that_is_not_ours_is_not_overwritten(
    make: Any, llama_assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "out")
    before = tree(tmp_path)
    words = options(llama_assets, tmp_path / "out", **SHORT, overwrite_output_dir="true")
    refused(words, "was not made by kdkernels", capfd)
    refused(["sweep", *words[1:]], "was not made by kdkernels", capfd)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "bad", [{"train_text": "nothing.txt"}, {"max_steps": 0}, {"optim": "adamw_8bit"}]
)
def test_nothing_is_deleted_before_everything_is_checked(
    bad: dict[str, Any], llama_assets: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(place)
    words = options(llama_assets, place / "out", **(SHORT | bad), overwrite_output_dir="true")
    refused(words, "", capfd)
    assert tree(place) == before


def test_results_stay_until_there_are_new_ones(
    llama_assets: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = tree(place / "out")
    train = distill.DistillationTrainer.train
    monkeypatch.setattr(distill.DistillationTrainer, "train", stopped)
    words = options(llama_assets, place / "out", **SHORT, overwrite_output_dir="true", seed=5)
    assert cli.main(words) == 130
    assert tree(place / "out").items() <= before.items()
    assert {"student/model.safetensors", "results.json", "report.md"} <= tree(place / "out").keys()
    monkeypatch.setattr(distill.DistillationTrainer, "train", train)
    assert cli.main(words) == 0
    after = tree(place / "out")
    assert after["student/model.safetensors"] != before["student/model.safetensors"]
    assert json.loads(after["results.json"])["rows"][-1]["seed"] == 5
    assert not [name for name in after if name.startswith(("distilled/", "."))]


def test_an_interrupted_run_does_not_block_the_same_command(
    llama_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = options(llama_assets, tmp_path / "out", max_steps=2)
    train = distill.DistillationTrainer.train
    with monkeypatch.context() as patched:

        def stopped(trainer: Any, *_: Any, **__: Any) -> None:
            train(trainer)
            raise KeyboardInterrupt

        patched.setattr(distill.DistillationTrainer, "train", stopped)
        assert cli.main(words) == 130
    assert (tmp_path / "out" / "labels-only").is_dir()
    assert cli.main(words) == 0


# ---- secrets ------------------------------------------------------------------------------------


def test_no_secret_is_written_or_shown(
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_FROMTHEENVIRONMENT")
    output = tmp_path / "out"
    notice = f"from https://me:{SECRET}@host/x.txt?token={SECRET}&a=1, hf_FROMTHEENVIRONMENT"
    changes: dict[str, Any] = {"hub_token": SECRET, "data_notice": notice, "save_strategy": "steps"}
    changes |= {"save_steps": 1, "lr_scheduler_kwargs": "{}"}
    assert cli.main(options(llama_assets, output, **(SHORT | changes))) == 0
    printed = "".join(capfd.readouterr())
    assert SECRET not in printed and "FROMTHEENVIRONMENT" not in printed
    written = tree(tmp_path)
    assert len(written) > 15
    for name, content in written.items():
        assert b"SECRETSECRET" not in content and b"FROMTHEENVIRONMENT" not in content, name
    card = written["out/student/README.md"].decode()
    assert "from https://***@host/x.txt?token=***&a=1, ***" in card


def test_a_sweep_and_its_best_settings_hold_no_secret(llama_assets: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"hub_token: {SECRET}\n")
    words = options(llama_assets, tmp_path / "out", max_steps=1)[1:]
    lists = ["--sweep_temperatures", "1", "--sweep_alphas", "0.5"]
    assert cli.main(["sweep", str(config), *words, *lists]) == 0
    assert not [name for name, c in tree(tmp_path / "out").items() if SECRET.encode() in c]
    assert "hub_token" not in yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": f"https://me:{SECRET}@host/model"},
        {"train_text": f"https://host/x.txt?access_token={SECRET}"},
        {"hub_token": SECRET, "teacher": SECRET},
        {"hub_token": SECRET, "divergens": SECRET},
    ],
)
def test_a_refusal_shows_no_secret(
    changes: dict[str, Any],
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = options(llama_assets, tmp_path / "out", **(SHORT | changes))
    with pytest.raises(AssertionError):
        refused(words, SECRET, capfd)
    refused(words, "***", capfd)


def test_a_traceback_shows_no_secret(
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError(f"401 for {SECRET}")

    monkeypatch.setattr(distill, "teacher_row", fails)
    words = options(llama_assets, tmp_path / "out", **SHORT, hub_token=SECRET)
    assert cli.main(words) == 1
    errors = capfd.readouterr().err
    assert SECRET not in errors and "RuntimeError: 401 for ***" in errors


@pytest.mark.parametrize(
    "name",
    ["hub_token", "HF_TOKEN", "token", "api_key", "apiKey", "password", "Authorization"],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)
    assert without_secrets({"a": {name: SECRET}, "b": [{name: SECRET}]}) == {"a": {}, "b": [{}]}
    told = without_secrets({"deepspeed": json.dumps({name: SECRET, "x": 1})})["deepspeed"]
    assert json.loads(told) == {name: "***", "x": 1}


@pytest.mark.parametrize(
    "name", ["max_train_tokens", "tokens_seen", "teacher", "include_num_input_tokens_seen", "keys"]
)
def test_names_of_no_secrets(name: str) -> None:
    assert without_secrets({name: "value"}) == {name: "value"}


def test_texts_without_secrets_stay_as_they_are() -> None:
    text = "see https://host/a@b?x=1 and user@host: token 'w0' is id 3, 5 tokens; git+ssh://host"
    assert redacted(text) == text
    assert redacted("http://u:p@h/x s3://key:pw@bucket") == "http://***@h/x s3://***@bucket"
    assert redacted(f"hf_{'a' * 34}!") == "***!"


# ---- sweeps -------------------------------------------------------------------------------------

LISTS = ["--sweep_temperatures", "1", "4", "--sweep_alphas", "0.5", "1"]


def sweep_words(assets: Path, output: Path, **changes: Any) -> list[str]:
    return ["sweep", *options(assets, output, **({"max_steps": 1} | changes))[1:], *LISTS]


def trials(output: Path) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads((output / "sweep.json").read_text(), parse_constant=no_constant)["trials"]


def test_a_sweep_goes_on_where_it_was_stopped(
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert cli.main(sweep_words(llama_assets, whole)) == 0
    train = distill.DistillationTrainer.train
    started: list[None] = []

    def stopped(trainer: Any, *_: Any, **__: Any) -> Any:
        started.append(None)
        if len(started) == 3:
            raise KeyboardInterrupt
        return train(trainer)

    monkeypatch.setattr(distill.DistillationTrainer, "train", stopped)
    assert cli.main(sweep_words(llama_assets, output)) == 130
    assert len(trials(output)) == 2
    capfd.readouterr()
    refused(sweep_words(llama_assets, output, seed=7), "was made with another seed", capfd)
    assert cli.main(sweep_words(llama_assets, output)) == 0
    assert capfd.readouterr().out.count("(of the earlier sweep)") == 2
    assert len(started) == 5  # two, the one that was stopped, and the two that were left
    assert [row["loss"] for row in trials(output)] == [row["loss"] for row in trials(whole)]
    refused(sweep_words(llama_assets, output), "is not empty", capfd)
    again = sweep_words(llama_assets, output, resume_from_checkpoint="true")
    assert cli.main(again) == 0 and len(started) == 5
    refused(
        sweep_words(llama_assets, tmp_path / "new", resume_from_checkpoint="true"),
        "resume_from_checkpoint: no sweep.json",
        capfd,
    )


def test_a_trial_that_fails_loses_no_other(
    llama_assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    train = distill.DistillationTrainer.train

    def failing(trainer: Any, *_: Any, **__: Any) -> Any:
        if trainer.args.temperature == 4 and trainer.args.alpha == 0.5:
            raise RuntimeError("out of memory")
        if trainer.args.temperature == 4:
            with torch.no_grad():
                trainer.model.model.norm.weight[0] = torch.nan
        return train(trainer)

    monkeypatch.setattr(distill.DistillationTrainer, "train", failing)
    output = tmp_path / "out"
    assert cli.main(sweep_words(llama_assets, output)) == 1
    captured = capfd.readouterr()
    message = "trial 3 of 4 (RuntimeError: out of memory)"
    assert f"kdkernels sweep: error: {message}\n" in captured.err
    found = trials(output)
    assert [row.get("error") for row in found] == [None, None, message, None]
    assert found[3]["loss"] is None and found[0]["loss"] > 0
    best = yaml.safe_load((output / "best.yaml").read_text())
    assert best["temperature"] == 1
    assert (output / "sweep.png").exists() and "nan" in (output / "sweep.md").read_text()
    monkeypatch.setattr(distill.DistillationTrainer, "train", train)
    assert cli.main(sweep_words(llama_assets, output, resume_from_checkpoint="true")) == 0
    assert not [row for row in trials(output) if "error" in row]


def test_a_sweep_without_any_result(llama_assets: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert cli.main(sweep_words(llama_assets, output, learning_rate=1e30, max_steps=3)) == 1
    assert len(trials(output)) == 4 and not (output / "best.yaml").exists()
    assert (output / "sweep.png").exists()


def test_the_best_settings_are_no_input_to_be_replaced(
    llama_assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = options(llama_assets, output, max_steps=1)[1:]
    lists = ["--sweep_temperatures", "1", "--sweep_alphas", "0.5"]
    assert cli.main(["sweep", *words, *lists]) == 0
    again = ["sweep", str(output / "best.yaml"), *words, *lists, "--overwrite_output_dir=true"]
    refused(again, "and config needs", capfd)
    assert os.path.getsize(output / "best.yaml")
