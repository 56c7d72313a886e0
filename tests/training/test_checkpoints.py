"""Checkpoints: which are whole, what a training goes on from, what is not written."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from kdkernels.training import checkpoints
from kdkernels.training.trainer import TERMS_FILE

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread

SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
#: AdamW and a schedule, so that what a lost file holds would change the result.
SAVING |= {"optim": "adamw_torch", "lr_scheduler_type": "linear", "learning_rate": 0.05}


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Checkpoints of steps 2 and 4 of a training of 4 steps, and the weights that it ends with."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = tiny_models.trainer(folder, **SAVING)
    trainer.train()
    return folder, weights(trainer)


@pytest.fixture
def folder(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def last_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80garbage" * 50)


def one_byte(path: Path) -> None:
    """Within the largest tensor of a torch file: its length and its directory are as they were."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def other_state(path: Path) -> None:
    torch.save({"something": 1}, path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def list_of(path: Path) -> None:
    path.write_text("[1]")


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    (name, damage) for name in FILES for damage in (Path.unlink, half, emptied, garbage, directory)
]
DAMAGES += [("model.safetensors", last_bytes), ("optimizer.pt", last_bytes)]
DAMAGES += [("optimizer.pt", one_byte), ("optimizer.pt", other_state)]
DAMAGES += [("scheduler.pt", other_state), ("trainer_state.json", list_of), ("config.json", half)]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_every_damage_is_seen_and_named(
    name: str, damage: Callable[[Path], None], folder: Path
) -> None:
    newest = folder / "checkpoint-4"
    needed = ["optimizer.pt", "scheduler.pt", *checkpoints.rng_files(1)]
    assert checkpoints.damage(newest, needed) is None
    damage(newest / name)
    reason = checkpoints.damage(newest, needed)
    assert reason is not None and "\n" not in reason
    assert name in reason or (name, damage) == ("model.safetensors", Path.unlink)
    found, damaged = checkpoints.newest_whole(folder, needed)
    assert found == folder / "checkpoint-2" and damaged == [f"checkpoint-4: {reason}"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [("optimizer.pt", Path.unlink), ("rng_state.pth", half), ("model.safetensors", last_bytes)],
)
def test_training_goes_on_from_the_newest_whole_one(
    name: str,
    damage: Callable[[Path], None],
    folder: Path,
    trained: tuple[Path, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(folder / "checkpoint-4" / name)
    trainer = tiny_models.trainer(folder, **SAVING)
    with caplog.at_level(logging.WARNING, "kdkernels"):
        trainer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(trainer), trained[1])  # as if it had never stopped
    told = [m for m in caplog.messages if "goes on from checkpoint-2" in m]
    assert len(told) == 1 and f"checkpoint-4: {name}" in told[0] and "\n" not in told[0]


def test_a_checkpoint_by_its_path_is_whole_or_refused(folder: Path) -> None:
    newest = folder / "checkpoint-4"
    (newest / "scheduler.pt").unlink()
    trainer = tiny_models.trainer(folder, **SAVING)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*scheduler.pt is missing"):
        trainer.train(resume_from_checkpoint=str(newest))
    with pytest.raises(ValueError, match="is not a folder"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    shutil.rmtree(folder / "checkpoint-2")
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*checkpoint-4: scheduler.pt"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_optimizer_is_no_state_of_a_training(tmp_path: Path) -> None:
    tiny_models.trainer(tmp_path, **SAVING, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"no whole checkpoint .*rng_state.pth is missing"):
        tiny_models.trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_weights_that_a_checkpoint_lacks_do_not_stay_as_they_are(folder: Path) -> None:
    file = folder / "checkpoint-4" / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if "mlp" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint lacks 3 weights of the student \(model"):
        tiny_models.trainer(folder, **SAVING).train(resume_from_checkpoint=True)


def test_shards_are_part_of_a_checkpoint(folder: Path) -> None:
    newest = folder / "checkpoint-4"
    tensors = load_file(newest / "model.safetensors")
    (newest / "model.safetensors").unlink()
    first, *others = tensors
    save_file({first: tensors[first]}, newest / "model-1.safetensors")
    save_file({name: tensors[name] for name in others}, newest / "model-2.safetensors")
    shards = dict.fromkeys(others, "model-2.safetensors") | {first: "model-1.safetensors"}
    index = newest / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert checkpoints.damage(newest, []) is None
    last_bytes(newest / "model-1.safetensors")
    assert checkpoints.damage(newest, []) == "model-1.safetensors is damaged"
    (newest / "model-1.safetensors").unlink()
    assert checkpoints.damage(newest, []) == "model-1.safetensors is missing"
    index.write_text('{"weight_map": {}}')
    assert checkpoints.damage(newest, []) == f"{index.name} names no files"
    half(index)
    assert checkpoints.damage(newest, []) == f"{index.name} cannot be read"


def test_what_terms_have_learnt_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    options = SAVING | {"terms": {"hidden": 1.0}, "layer_map": "1:2"}
    student = tiny_models.llama(1, seed=1, hidden=8)  # a projection is learnt
    tiny_models.trainer(tmp_path, student=student, **options).train()
    (tmp_path / "checkpoint-4" / TERMS_FILE).unlink()
    student = tiny_models.llama(1, seed=1, hidden=8)
    trainer = tiny_models.trainer(tmp_path, student=student, **options)
    assert trainer.newest_checkpoint() == tmp_path / "checkpoint-2"


def test_every_process_has_random_numbers_of_its_own(folder: Path) -> None:
    needed = checkpoints.rng_files(2)
    shutil.copy(folder / "checkpoint-4" / "rng_state.pth", folder / "checkpoint-4" / needed[0])
    assert checkpoints.damage(folder / "checkpoint-4", needed) == "rng_state_1.pth is missing"


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, **SAVING | {"save_total_limit": 1})
    count = 0

    def poison(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            with torch.no_grad():
                trainer.model.model.norm.weight[0] = math.nan

    trainer.model.register_forward_pre_hook(poison)
    with pytest.raises(FloatingPointError, match=r"step 4: model.* is not finite; no checkpoint"):
        trainer.train()
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["checkpoint-2"]
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_the_state_is_json_whatever_was_logged(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, **SAVING)
    log = trainer.log
    trainer.log = lambda logs, *rest: log(logs | {"odd": math.nan, "large": math.inf}, *rest)
    trainer.train()
    text = (tmp_path / "checkpoint-4" / "trainer_state.json").read_text()
    state = json.loads(text, parse_constant=no_constant)
    assert state["log_history"][0]["odd"] is state["log_history"][0]["large"] is None
    assert math.isnan(trainer.state.log_history[0]["odd"])
    tiny_models.trainer(tmp_path, **SAVING | {"max_steps": 5}).train(resume_from_checkpoint=True)


def test_no_token_is_in_a_checkpoint(tmp_path: Path) -> None:
    trainer = tiny_models.trainer(tmp_path, **SAVING, hub_token="hf_SECRETSECRET")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"SECRETSECRET" in path.read_bytes()]
    assert trainer.args.hub_token == "hf_SECRETSECRET"
    arguments = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert arguments.hub_token is None and arguments.temperature == 2.0
