"""The command line: a whole run on a tiny model, YAML, resuming, and every kind of bad input."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from command_line import options, refused
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    MambaConfig,
    MambaForCausalLM,
)

from kdkernels.commands import main as cli
from kdkernels.commands import report, speed, sweep
from kdkernels.commands.experiment import ModelArguments, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


one_thread = tiny_models.one_thread
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a text, and things that are wrong."""
    folder = tmp_path_factory.mktemp("assets")
    teacher = tiny_models.save_model(folder / "teacher", layers=4, seed=2)
    card = "---\nlicense: apache-2.0\n---\nA teacher.\n"
    (teacher / "README.md").write_text(card)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(len(tiny_models.WORDS), (900,), generator=generator).tolist()
    (folder / "text.txt").write_text(" ".join(tiny_models.WORDS[i] for i in words))
    (folder / "short.txt").write_text("w1 w2")
    swapped = [*tiny_models.WORDS[1:], tiny_models.WORDS[0]]
    tiny_models.llama(1, seed=1).save_pretrained(folder / "other-tokenizer")
    tiny_models.tokenizer(swapped).save_pretrained(folder / "other-tokenizer")
    config = BertConfig(vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertForMaskedLM(config).save_pretrained(folder / "bert")
    tiny_models.tokenizer().save_pretrained(folder / "bert")
    tiny_models.save_model(folder / "wide", layers=1, seed=1, vocab=tiny_models.VOCAB + 3)
    settings = {"hidden_size": 16, "num_hidden_layers": 4, "state_size": 4, "pad_token_id": 1}
    MambaForCausalLM(MambaConfig(vocab_size=17, **settings)).save_pretrained(folder / "mamba")
    tiny_models.tokenizer().save_pretrained(folder / "mamba")
    (folder / "numbers.jsonl").write_text('{"text": 7}\n' * 20)
    (folder / "not-a-model").mkdir()
    broken = tiny_models.save_model(folder / "broken", layers=1, seed=1)
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    return folder


def test_a_whole_run(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert cli.main(options(assets, output, eval_strategy="steps", eval_steps=2)) == 0
    printed, errors = capsys.readouterr()
    found = "fused_linear: logits in tiles only: student (lm_head), teacher (lm_head)\n"
    assert errors.count("fused_linear") == errors.count(found) == 1  # of two trainings
    names = ["teacher", "student, untrained", "student, labels only", "student, distilled"]
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["model", "-" * 20, *names]
    assert len({len(line) for line in lines}) == 1

    results = json.loads((output / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == names
    assert rows["student, distilled"]["parameters"] < rows["teacher"]["parameters"]
    assert rows["student, distilled"]["loss"] != rows["student, labels only"]["loss"]
    assert results["configuration"]["student_layers"] == "0,3"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in output.iterdir()} == {*report.RESULT_FILES, "student"}
    saved = (output / "student" / "model.safetensors").stat().st_size
    assert rows["student, distilled"]["megabytes"] * 1e6 == pytest.approx(saved, rel=0.25)
    assert "tokens_per_second" not in rows["student, untrained"]
    for name in (names[0], *names[2:]):
        assert rows[name]["tokens_per_second"] > 0 and len(rows[name]["forward_seconds"]) >= 7
    for name in names[2:]:  # 4 updates of 2 sequences of 16
        assert [rows[name][key] for key in ("steps", "tokens_seen", "seed")] == [4, 128, 42]
    text = (output / "report.md").read_text()
    assert report.table(results["rows"]) in text and "student_layers: 0,3" in text
    assert "the same batches, 4 steps, 128 tokens each" in text
    page = (output / "report.html").read_text()
    assert "<td>student, distilled</td>" in page and "<pre>" in page and "|" not in page

    student = AutoModelForCausalLM.from_pretrained(output / "student")
    assert student.config.num_hidden_layers == 2 and student.config.use_cache
    assert AutoTokenizer.from_pretrained(output / "student").get_vocab()["w0"] == 2
    card = (output / "student" / "README.md").read_text()
    assert "license: apache-2.0" in card and report.table(results["rows"]) in card
    student.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False)


def test_a_narrow_column_has_a_rule_that_markdown_reads() -> None:
    table = report.markdown([["a", "T"], ["x", "1"]])
    assert table == "| a  |  T |\n| -- | -: |\n| x  |  1 |"


def test_the_columns_of_a_run() -> None:
    teacher = {"name": "teacher", "parameters": 8e6, "tokens_per_second": 100.0}
    student = {"name": "student, distilled", "parameters": 2e6, "tokens_per_second": 250.0}
    student |= {"seed": 3, "steps": 5, "tokens_seen": 640}
    lines = [line.split("|") for line in report.table([teacher, student]).splitlines()]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    titles = ["model", "parameters", "size", "tokens/s", "speed", "seed", "steps", "tokens seen"]
    assert cells[0] == titles
    assert cells[2] == ["teacher", "8.0 M", "1.00x", "100", "1.00x", "-", "-", "-"]
    assert cells[3] == ["student, distilled", "2.0 M", "0.25x", "250", "2.50x", "3", "5", "640"]
    other = student | {"name": "student, labels only"}
    assert report.budget([teacher, other, student]).endswith("5 steps, 640 tokens each.")
    unequal = report.budget([teacher, other | {"tokens_seen": 512}, student])
    assert "labels only: 5 steps, 512 tokens; " in unequal and "Equal" not in unequal


def test_equal_models_get_equal_speeds_on_a_machine_that_slows_down(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = prepare(*cli.parse(options(assets, tmp_path / "out")[1:]))
    calls: list[Any] = []

    def seconds(model: Any, batch: dict[str, torch.Tensor]) -> float:
        assert batch["input_ids"].shape == (3, 16) and "labels" not in batch
        calls.append(model)
        return 1.1 ** len(calls)

    monkeypatch.setattr(speed, "_forward_seconds", seconds)
    models: dict[str, Any] = {"a": object(), "b": object()}
    speeds = speed.forward_speeds(experiment, models)
    assert len(calls) == 2 * (1 + speed._SPEED_ROUNDS[1])  # the first round warms up
    assert all(set(calls[at : at + 2]) == set(models.values()) for at in range(0, len(calls), 2))
    rates = [each["tokens_per_second"] for each in speeds.values()]
    assert max(rates) < 1.15 * min(rates)  # one after the other: 1.1 ** 31 = 19 apart
    first = sorted(speeds["a"]["forward_seconds"])
    assert rates[0] == 48 / first[15]
    assert speeds["a"]["speed_spread"] == pytest.approx(
        ((first[22] + first[23]) - (first[7] + first[8])) / 4 / first[15]
    )


def test_a_run_with_terms_from_yaml(assets: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    layer_map, terms = [[0, 0], [1, 2], [2, 4]], {"hidden": 1, "gram": "warmup:1:0.5"}
    settings = {"layer_map": layer_map, "terms": terms, "temperature_schedule": "linear:2:1"}
    config.write_text(yaml.safe_dump(settings))
    command = options(assets, tmp_path / "out", max_steps=2, student_dropout=0.0)
    assert cli.main(["distill", str(config), *command[1:]]) == 0
    curves = json.loads((tmp_path / "out" / "results.json").read_text())["curves"]
    assert {"hidden_loss", "gram_loss", "gram_weight", "temperature"} <= curves["distilled"][
        0
    ].keys()
    assert "hidden_loss" not in curves["labels only"][0]


def test_a_run_on_local_files_asks_no_network(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.getaddrinfo", connect)
    monkeypatch.setattr("socket.socket.connect", connect)
    assert cli.main(options(assets, tmp_path / "out", baseline="false", max_steps=1)) == 0


def test_the_results_are_those_of_the_saved_student(assets: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert cli.main(options(assets, output, baseline="false")) == 0
    results = json.loads((output / "results.json").read_text())
    assert [row["name"] for row in results["rows"]][2:] == ["student, distilled"]
    student = AutoModelForCausalLM.from_pretrained(output / "student")
    tokenizer = AutoTokenizer.from_pretrained(output / "student")
    ids = tokenizer((assets / "text.txt").read_text())["input_ids"] + [1]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    held_out = blocks[-round(len(blocks) * 0.05) :]
    with torch.no_grad():
        logits = student(input_ids=held_out).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert results["rows"][-1]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_both_students_see_the_same_batches(assets: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the label loss of every step is the same in both trainings."""
    assert cli.main(options(assets, tmp_path / "out", learning_rate=0.0)) == 0
    curves = json.loads((tmp_path / "out" / "results.json").read_text())["curves"]
    series = [[e["ce_loss"] for e in log if "ce_loss" in e] for log in curves.values()]
    assert len(series) == 2 and len(series[0]) == 4 and series[0] == series[1]


def test_two_processes_give_the_table_of_one(assets: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(options(assets, one, per_device_train_batch_size=4)) == 0
    tiny_models.two_processes("-m", "kdkernels", *options(assets, two))
    single, both = (json.loads((f / "results.json").read_text())["rows"] for f in (one, two))
    for a, b in zip(single, both, strict=True):
        for key in ("loss", "divergence", "agreement"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["name"], key)


def test_yaml_and_overrides(assets: Path, tmp_path: Path) -> None:
    words = options(assets, tmp_path / "unused", student_layers=None, max_steps=50)[1:]
    content: dict[str, Any] = dict(word.removeprefix("--").split("=", 1) for word in words)
    content |= {"student_layers": [0, 1, 3], "use_cpu": True, "learning_rate": 1e-2}
    content |= {"divergence": "alpha_beta", "divergence_parameters": [0.5, 0.25], "seed": None}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    output = tmp_path / "out"
    assert cli.main(["distill", str(config), "--max_steps", "2", f"--output_dir={output}"]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["rows"][-1]["steps"] == 2
    assert results["configuration"]["student_layers"] == "0,1,3"
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("start", [{"student": "teacher"}, {"student_config": "wide/config.json"}])
def test_other_students(start: dict[str, str], assets: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"student_layers": None, "vocab_policy": "truncate"}
    changes |= {option: assets / name for option, name in start.items()}
    assert cli.main(options(assets, tmp_path / "out", **changes)) == 0


def test_resuming_and_overwriting(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    assert cli.main(options(assets, through, **saving)) == 0
    assert cli.main(options(assets, resumed, **saving)) == 0
    # As if it had been stopped after step 2, and killed while it wrote the checkpoint of step 4.
    (resumed / "labels-only" / "checkpoint-4").rename(tmp_path / "gone")
    (resumed / "distilled" / "checkpoint-4" / "trainer_state.json").unlink()
    (resumed / "distilled" / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    again = options(assets, resumed, **saving, resume_from_checkpoint="true")
    assert cli.main(again) == 0
    losses = [
        [row["loss"] for row in json.loads((folder / "results.json").read_text())["rows"]]
        for folder in (through, resumed)
    ]
    assert losses[0] == losses[1]
    rows = json.loads((resumed / "results.json").read_text())["rows"][2:]
    assert [(r["resumed_from_step"], r["steps"], r["tokens_seen"]) for r in rows] == 2 * [
        (2, 4, 128)
    ]
    capsys.readouterr()
    assert cli.main([*again, "--overwrite_output_dir=true"]) == 2
    assert "overwrite_output_dir: would delete" in capsys.readouterr().err
    (through / "mine.txt").write_text("kept")
    capsys.readouterr()
    assert cli.main(options(assets, through)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert cli.main(options(assets, through, overwrite_output_dir="true", max_steps=1)) == 0
    names = {p.name for p in through.iterdir()}
    assert names == {*report.RESULT_FILES, "mine.txt", "student"}


BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"teacher": None}, "give --teacher, or --teacher_url, or the --teacher_cache of one of them"),
    ({"teacher": "{assets}/nowhere"}, "teacher: '{assets}/nowhere' does not exist"),
    ({"teacher": "{assets}/nowhere.gguf"}, "does not exist"),
    ({"teacher": "no-such-model"}, "teacher: cannot load the configuration of 'no-such-model'"),
    ({"teacher": "{assets}/not-a-model"}, "teacher: no config.json in folder"),
    ({"teacher": "{assets}/bert"}, "teacher: 'bert' (BertConfig) is not a decoder-only"),
    ({"teacher": "{assets}/broken", "student_layers": "0"}, "teacher: cannot load the model of"),
    ({"teacher": "{assets}/text.txt"}, "is neither a folder nor a .gguf file"),
    ({"student_layers": "0,9"}, "student_layers: 9 is outside 0..3"),
    ({"student_layers": "3,0"}, "student_layers: '3,0' is not strictly increasing"),
    ({"student_layers": "a"}, "student_layers: 'a' is not a list"),
    ({"student_layers": None}, "exactly one of --student, --student_config and --student_layers"),
    ({"student": "{assets}/wide"}, "(given: student, student_layers)"),
    ({"student_layers": None, "student": "{assets}/wide"}, "student: vocabulary of 20"),
    (
        {"student_layers": None, "student": "{assets}/other-tokenizer"},
        "student: tokenizers differ: token 'w0' is id",
    ),
    ({"train_text": "{assets}/nothing.txt"}, "train_text: '{assets}/nothing.txt' does not exist"),
    ({"validation_text": "nothing.txt"}, "validation_text: 'nothing.txt' does not exist"),
    ({"train_text": "{assets}/short.txt"}, "train_text: not enough text, 3 tokens"),
    ({"sequence_length": 1}, "sequence_length: 1"),
    ({"sequence_length": 600}, "cannot be split with validation_fraction"),
    ({"validation_fraction": 1.0}, "validation_fraction: 1.0"),
    ({"max_train_tokens": 3}, "max_train_tokens: 3"),
    ({"alpha": 2}, "alpha: 2.0"),
    ({"temperature": 0}, "temperature: 0.0"),
    ({"temperature": "hot"}, "argument --temperature: invalid float value: 'hot'"),
    ({"divergence": "kl"}, "divergence: 'kl' is not one of forward_kl"),
    ({"terms": "hiden=1"}, "terms: 'hiden' is not one of response, hidden"),
    ({"terms": "hidden=1", "layer_map": "1:5"}, "teacher layer 5 of pair 1:5 does not exist"),
    ({"terms": "minilm=1", "relation_heads": 3}, "relation_heads: 3 does not divide"),
    ({"student_dropout": 1}, "student_dropout: 1.0 is not in [0, 1)"),
    ({"divergens": "kl"}, "unknown option '--divergens=kl'; did you mean '--divergence'?"),
    ({"loss_backend": "tpu"}, "loss_backend: 'tpu' is not one of"),
    ({"student_dtype": "int8"}, "student_dtype: 'int8' is not one of"),
    ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint: no checkpoint in"),
    ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint: 'x'"),
    ({"train_text": "{assets}/numbers.jsonl"}, "text_column: 'text' of train_text holds 7 (int)"),
    ({"sequence_length": 80}, "sequence_length: 80 tokens are more than the 64 positions of teach"),
    ({"terms": "hidden=1,hidden=2"}, "terms: 'hidden=1,hidden=2' holds a term twice"),
    ({"terms": "response=0"}, "terms: 'response=0': every weight is 0"),
    ({"terms": "attention=1", "layer_map": "0:0"}, "layer_map: '0:0' has only embeddings"),
    ({"layer_map": "7:9"}, "layer_map: student layer 7 of pair 7:9 does not exist"),
    ({"layer_map": "1:1,1:1", "terms": "hidden=1"}, "layer_map: '1:1,1:1' is not uniform, last"),
    ({"temperature_schedule": "warmup:2:0.5"}, "temperature_schedule: 0.0 is not allowed"),
    ({"max_steps": 0}, "max_steps: 0 with num_train_epochs: 3.0 is no training"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 is not at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: 0 is not at least 1"),
    ({"learning_rate": "nan"}, "learning_rate: nan is not allowed"),
    ({"seed": -1}, "seed: -1 is not at least 0"),
    ({"cache_top_k": 0}, "cache_top_k: 0 is not at least 1"),
    (
        {"teacher": "{assets}/mamba", "terms": "attention=1"},
        "terms: the student 'mamba' (MambaForCausalLM) gives no attentions",
    ),
    (
        {"teacher": "{assets}/wide", "student": "{assets}/teacher", "terms": "hidden=1"}
        | {"student_layers": None, "vocab_policy": "truncate"},
        "layer_map: 'uniform' needs a teacher with at least as many layers as the student",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_INPUT)
def test_bad_input_is_one_line(
    changes: dict[str, Any],
    message: str,
    assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    filled = {k: v.format(assets=assets) if isinstance(v, str) else v for k, v in changes.items()}
    refused(options(assets, tmp_path / "out", **filled), message.format(assets=assets), capfd)
    assert not (tmp_path / "out").exists()


def test_bad_configurations(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    refused(["distill", str(config)], "does not exist", capfd)
    for content, message in [
        ("temprature: 2", "unknown key 'temprature'; did you mean 'temperature'?"),
        ("- 1", "does not hold `option: value` lines"),
        ("a: [", "is not YAML"),
        ("", "does not hold `option: value` lines"),
        ("temperature: [1, 2]", "argument --temperature: invalid float value: '1,2'"),
        ("max_steps: many", "invalid int value: 'many'"),
        ("baseline: maybe", "got maybe"),
        ("terms: hidden", "terms: 'hidden' is not a list such as hidden=1"),
        ("terms: {hidden: {a: 1}}", "terms: hidden: {'a': 1} is not a number"),
        ("layer_map: [[1, 2, 3]]", "layer_map: '1:2:3' is not uniform, last"),
    ]:
        config.write_text(content)
        refused(["distill", str(config), *options(assets, tmp_path / "out")[1:]], message, capfd)


def test_output_that_exists_is_not_touched(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("precious")
    refused(options(assets, tmp_path), "is not empty", capfd)
    refused(options(assets, tmp_path / "results.json"), "is not a folder", capfd)
    refused(options(assets, tmp_path / "results.json" / "out"), "results.json' is not a f", capfd)
    assert (tmp_path / "results.json").read_text() == "precious"


def documented() -> list[str]:
    """Commands of the README and the settings page that need no file of an earlier one."""
    lines = [line for name in ("README.md", "docs/settings.md") for line in (ROOT / name).open()]
    commands = [line.strip() for line in lines if line.startswith("    kdkernels ")]
    known = ("kdkernels distill ", "kdkernels sweep ", "kdkernels cache-teacher ")
    return [c for c in commands if c.startswith(known) and "sweep/best.yaml" not in c]


@pytest.mark.parametrize("command", documented())
def test_documented_options_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, name, *words = shlex.split(command)
    others = [sweep.SweepArguments] if name == "sweep" else []
    model, _, _, args, *_ = cli.parse(words, name, others)
    args.resolved_terms(model.task != "encoder")


def test_unknown_commands(capfd: pytest.CaptureFixture[str]) -> None:
    refused(["destil"], "invalid choice: 'destil'", capfd)
    refused([], "the following arguments are required", capfd)
    refused(["fetch", "gpt5"], "invalid choice: 'gpt5'", capfd)


def test_help_names_the_options_of_distillation(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in [
        (["--help"], "distill"),
        (["distill", "--help"], "--student_layers"),
    ]:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0 and expected in capsys.readouterr().out


def test_info_is_light_and_lists_every_backend() -> None:
    program = (
        "import sys; from kdkernels.commands.main import main; code = main(['info']);"
        "print({'transformers', 'datasets', 'accelerate'} & set(sys.modules) or code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "0"
    for name in ("cpu", "torch", "reference"):
        assert any(line.split()[0] == name and "can" in line for line in lines), done.stdout


def test_model_arguments_need_one_way_to_a_student() -> None:
    with pytest.raises(ValueError, match="given: none"):
        ModelArguments(teacher="x")
