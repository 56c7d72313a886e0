"""Wrong inputs to every command: one line, code 2, nothing left, and the right command runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import options, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdkernels.commands import main as cli

pytestmark = pytest.mark.usefixtures("one_thread", "offline")
one_thread = tiny_models.one_thread


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def half(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    return sorted(folder.glob("model-*.safetensors"))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1." in name]:
        del tensors[name]


#: Name of a damaged model -> how it is made of a whole one.
MODELS: dict[str, Callable[[Path], Any]] = {
    "no-tokenizer": lambda f: [p.unlink() for p in f.glob("tokenizer*")],
    "half-tokenizer": lambda f: half(f, "tokenizer.json"),
    "odd-tokenizer": lambda f: (f / "tokenizer_config.json").write_text("[1]"),
    "half-config": lambda f: half(f, "config.json"),
    "empty-config": lambda f: (f / "config.json").write_text(""),
    "odd-config": lambda f: (f / "config.json").write_text("{}"),
    "config-folder": lambda f: directory(f / "config.json"),
    "half-weights": lambda f: half(f, "model.safetensors"),
    "no-weights": lambda f: (f / "model.safetensors").unlink(),
    "weights-folder": lambda f: directory(f / "model.safetensors"),
    "lacks-a-layer": lambda f: changed(f, drop_layer),
    "nan-weights": lambda f: changed(f, lambda t: t["model.norm.weight"].fill_(torch.nan)),
    "lacks-a-shard": lambda f: sharded(f)[0].unlink(),
    "half-index": lambda f: [sharded(f), half(f, "model.safetensors.index.json")],
    "odd-generation": lambda f: (f / "generation_config.json").write_text("{"),
    "bad-generation": lambda f: (f / "generation_config.json").write_text(
        '{"max_length": -1, "max_new_tokens": -1}'
    ),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    whole = tiny_models.save_model(folder / "teacher", layers=4, seed=2)
    for name, damage in MODELS.items():
        damage(Path(shutil.copytree(whole, folder / name)))
    words = torch.randint(len(tiny_models.WORDS), (900,)).tolist()
    (folder / "text.txt").write_text(" ".join(tiny_models.WORDS[i] for i in words))
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n ")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x81" * 100)
    (folder / "half.jsonl").write_text('{"text": "w1"}\n{"te')
    (folder / "half.parquet").write_bytes(b"PAR1")
    (folder / "other.csv").write_text("a,b\n1,2\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "tab.yaml").write_text("a:\n\tb")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe")
    (folder / "nested.yaml").write_text("max_steps: {a: 1}\n")
    (folder / "number.yaml").write_text("5: 3\n")
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def is_refused(
    words: list[str], assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = names(assets), names(tmp_path)
    refused(words, "error: ", capfd)
    assert (names(assets), names(tmp_path)) == before


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model(
    name: str, assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, damaged = tmp_path / "out", assets / name
    for words in (
        options(assets, output, teacher=damaged),
        options(assets, output, student=damaged, student_layers=None),
        ["sweep", *options(assets, output, teacher=damaged)[1:]],
        ["init-student", f"--teacher={damaged}", "--layers=0", f"--output_dir={output}"],
        ["cache-teacher", *options(assets, output, teacher=damaged, teacher_cache=output)[1:]],
    ):
        is_refused(words, assets, tmp_path, capfd)


BAD: list[dict[str, Any]] = [
    {"train_text": name}
    for name in (
        "empty.txt",
        "blank.txt",
        "binary.txt",
        "half.jsonl",
        "half.parquet",
        "other.csv",
        "empty",
        "teacher/model.safetensors",
        "nothing.txt",
        "nothing",
    )
]
BAD += [{"validation_text": name} for name in ("empty.txt", "binary.txt", "half.parquet", "empty")]
BAD += [{"output_dir": "text.txt"}, {"output_dir": "text.txt/x"}, {"output_dir": "teacher"}]
BAD += [{"teacher": name} for name in ("empty", "text.txt", "nothing", "x" * 300, "a/b/c", "a b")]


@pytest.mark.parametrize("paths", BAD, ids=lambda paths: "-".join(map(str, paths.items())))
def test_wrong_paths(
    paths: dict[str, str], assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    filled = {option: assets / name for option, name in paths.items()}
    words = options(assets, tmp_path / "out", **filled)
    is_refused(words, assets, tmp_path, capfd)
    is_refused(["sweep", *words[1:]], assets, tmp_path, capfd)
    if "output_dir" not in paths:
        words.append(f"--teacher_cache={tmp_path / 'cache'}")
        is_refused(["cache-teacher", *words[1:]], assets, tmp_path, capfd)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": ""},
        {"train_text": ""},
        {"validation_text": ""},
        {"student_layers": ""},
        {"student_layers": "0-"},
        {"student_layers": "-1"},
        {"student_layers": "0-99999999999"},
        {"student_layers": "99999999999999999999"},
        {"sequence_length": "x"},
        {"max_steps": "1e3"},
        {"max_steps": -1, "num_train_epochs": "nan"},
        {"max_steps": -1, "num_train_epochs": "inf"},
        {"max_grad_norm": "nan"},
        {"max_grad_norm": -1},
        {"logging_steps": -1},
        {"logging_steps": "nan"},
        {"save_strategy": "steps", "save_steps": 0},
        {"eval_strategy": "steps", "eval_steps": -2},
        {"data_seed": -1},
        {"data_seed": 2**70},
        {"seed": 2**40},
        {"warmup_steps": -1},
        {"optim": "nothing"},
        {"lr_scheduler_kwargs": "{{"},
        {"deepspeed": "nothing.json"},
        {"accelerator_config": '{{"a": 1}}'},
        {"task": "masked-lm"},
        {"task": "token-classification"},
        {"teacher_device": "cuda:7"},
        {"teacher_cache": "nothing", "student": "{assets}/teacher", "student_layers": None},
        {
            "teacher_cache": "{assets}/teacher",
            "student": "{assets}/teacher",
            "student_layers": None,
        },
        {"resume_from_checkpoint": ""},
        {"resume_from_checkpoint": "{assets}/teacher"},
        {"output_dir": "/dev/null"},
        {"output_dir": ""},
        {"output_dir": "a\0b"},
    ],
    ids=lambda changes: "-".join(map(str, changes.items())),
)
def test_wrong_values(
    changes: dict[str, Any], assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    filled = {k: v.format(assets=assets) if isinstance(v, str) else v for k, v in changes.items()}
    is_refused(options(assets, tmp_path / "out", **filled), assets, tmp_path, capfd)


@pytest.mark.parametrize(
    "name",
    ["list.yaml", "tab.yaml", "binary.yaml", "nested.yaml", "number.yaml", "empty", "no.yaml"],
)
def test_wrong_configurations(
    name: str, assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("distill", "sweep", "cache-teacher"):
        words = [command, str(assets / name), *options(assets, tmp_path / "out")[1:]]
        is_refused(words, assets, tmp_path, capfd)


@pytest.mark.parametrize(
    "words",
    [
        ["init-student", "--layers=9"],
        ["init-student", "--layers=uniform:0"],
        ["init-student", "--layers=0-"],
        ["init-student", "--layers=0", "--dtype=int8"],
        ["init-student", "--layers=0", "--task=nothing"],
        ["init-student", "--layers=0", "--output_dir={assets}/teacher"],
        ["init-student", "--layers=0", "--output_dir={assets}/text.txt"],
        ["init-student", "--layers=0", "--output_dir=/proc/nothing"],
        ["init-student"],
        ["fetch"],
        ["fetch", "nothing"],
        ["tune", "--rows", "x"],
        ["tune", "--dtype", "int8"],
        ["tune", "--divergence", "kl"],
        ["tune", "--rows", "0"],
        ["tune", "--vocab", "100", "-1"],
        ["distill"],
        ["distill", "--teacher"],
        ["distill", "--nothing"],
        ["--nothing"],
    ],
    ids=" ".join,
)
def test_wrong_words(
    words: list[str], assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(assets=assets) for word in words]
    if words[0] == "init-student":
        filled[1:1] = [f"--teacher={assets / 'teacher'}", f"--output_dir={tmp_path / 'out'}"]
    is_refused(filled, assets, tmp_path, capfd)


def test_a_half_made_student_does_not_block_the_next(
    assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "student"
    words = ["init-student", f"--teacher={assets / 'teacher'}", "--layers=0,2"]
    words.append(f"--output_dir={output}")
    save = PreTrainedModel.save_pretrained

    def failing(model: PreTrainedModel, folder: Path) -> None:
        save(model, folder)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", failing)
        is_refused(words, assets, tmp_path, capfd)
    assert cli.main(words) == 0
    assert AutoModelForCausalLM.from_pretrained(output).config.num_hidden_layers == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_a_half_made_cache_does_not_block_the_next(
    error: Any, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdkernels.training import teacher_cache

    add, calls = teacher_cache.Writer.add_batch, iter([True])

    def failing(writer: Any, *arguments: Any) -> None:
        add(writer, *arguments)
        writer.flush()
        if not next(calls, False):
            raise error

    cache = tmp_path / "cache"
    words = [*options(assets, tmp_path / "out")[1:], f"--teacher_cache={cache}"]
    with monkeypatch.context() as patched:
        patched.setattr(teacher_cache.Writer, "add_batch", failing)
        assert cli.main(["cache-teacher", *words]) != 0
    assert list(tmp_path.iterdir()) == []
    cache.mkdir()  # as a killed command leaves it
    (cache / ".kdkernels-killed").mkdir()
    assert cli.main(["cache-teacher", *words]) == 0
    assert json.loads((cache / "cache.json").read_text())["examples"] > 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cache.json", b""),
        ("cache.json", b"[]"),
        ("cache.json", b"{"),
        ("cache.json", None),
        ("vocab", b'"17"'),
        ("examples", b"null"),
        ("temperature", b'"2"'),
        ("rows-00000.safetensors", b""),
        ("rows-00000.safetensors", b"garbage" * 100),
        ("rows-00000.safetensors", None),
    ],
)
def test_a_damaged_cache(
    name: str,
    content: bytes | None,
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    changes = {"student": assets / "teacher", "student_layers": None, "teacher_cache": cache}
    words = options(assets, tmp_path / "out", **changes)
    assert cli.main(["cache-teacher", *words[1:]]) == 0
    if content is None:
        (cache / name).unlink()
    elif "." in name:
        (cache / name).write_bytes(content)
    else:
        info = json.loads((cache / "cache.json").read_text())
        (cache / "cache.json").write_text(json.dumps(info | {name: json.loads(content)}))
    refused(words, f"teacher_cache: '{cache}", capfd)
    assert names(tmp_path) <= {"cache", "cache/cache.json", "cache/rows-00000.safetensors"}


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def test_a_run_goes_on_from_whole_checkpoints_only(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = options(assets, output, **SAVING)
    assert cli.main(words) == 0
    results = json.loads((output / "results.json").read_text())["rows"]
    (output / "labels-only" / "checkpoint-4" / "optimizer.pt").unlink()
    for checkpoint in (output / "distilled").iterdir():
        (checkpoint / "scheduler.pt").write_bytes(b"half")
    capfd.readouterr()
    again = [*words, "--resume_from_checkpoint=true"]
    assert cli.main(again) == 0
    errors = capfd.readouterr().err.splitlines()
    told = [line for line in errors if "training goes on from" in line]
    assert [" from checkpoint-2; " in told[0], " from the beginning; " in told[1]] == [True, True]
    assert "checkpoint-4: optimizer.pt is missing" in told[0]
    assert "scheduler.pt is damaged" in told[1]
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in results]
    for arm in ("labels-only", "distilled"):
        for checkpoint in (output / arm).iterdir():
            (checkpoint / "rng_state.pth").unlink()
    before = names(tmp_path)
    refused(again, "resume_from_checkpoint: no whole checkpoint in", capfd)
    assert names(tmp_path) == before
