"""Checkpoints of a training: which of them are whole, and which to go on from."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
SCALER_FILE = "scaler.pt"

#: Weights in one file; an index beside them, of the same name and this suffix, names several.
_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_INDEX = ".index.json"


def rng_files(processes: int) -> list[str]:
    """The files of random number generators that so many processes write."""
    if processes == 1:
        return ["rng_state.pth"]
    return [f"rng_state_{process}.pth" for process in range(processes)]


def numbered(folder: Path) -> list[Path]:
    """All checkpoints in ``folder``, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    numbers = {path: path.name.rpartition("-")[2] for path in found}
    kept = [path for path in found if numbers[path].isdigit()]
    return sorted(kept, key=lambda path: int(numbers[path]), reverse=True)


def newest_whole(
    folder: Path, needed: Iterable[str], weights: bool = True
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in ``folder``, if any, and what is wrong with the newer ones."""
    needed = list(needed)
    damaged: list[str] = []
    for checkpoint in numbered(folder):
        reason = damage(checkpoint, needed, weights)
        if reason is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name}: {reason}")
    return None, damaged


def damage(checkpoint: Path, needed: Iterable[str], weights: bool = True) -> str | None:
    """Why training cannot go on from ``checkpoint`` as if it had never stopped; None: it can.

    Args:
        needed: names of the files beside weights and state that the training writes. transformers
            goes on without them, to another result.
        weights: whether the student's weights lie in the files of ``save_pretrained``.
    """
    if not checkpoint.is_dir():
        return "is not a folder"
    try:
        state = _json(checkpoint / STATE_FILE)
        if not isinstance(state.get("global_step"), int):
            raise _Damaged(f"{STATE_FILE} has no global_step")
        if (checkpoint / "config.json").exists():
            _json(checkpoint / "config.json")
        if weights:
            _check_weights(checkpoint)
        for name in needed:
            _check_file(checkpoint / name)
    except _Damaged as error:
        return str(error)
    return None


class _Damaged(Exception):
    """What is wrong, in words that begin with the file's name."""


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise _Damaged(f"{path.name} is missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _Damaged(f"{path.name} cannot be read") from error
    if not isinstance(found, dict):
        raise _Damaged(f"{path.name} cannot be read")
    return found


def _check_weights(checkpoint: Path) -> None:
    """All files of the student's weights; several adapters have a folder each."""
    places = [checkpoint]
    while places:
        place = places.pop(0)
        for name in _WEIGHTS:
            if (place / name).exists():
                _check_file(place / name)
                return
            index = place / f"{name}{_INDEX}"
            if index.exists():
                _check_shards(index)
                return
        if place is checkpoint:
            places += sorted(path for path in place.iterdir() if path.is_dir())
    raise _Damaged("its weights are missing")


def _check_shards(index: Path) -> None:
    parts = _json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise _Damaged(f"{index.name} names no files")
    for name in sorted({str(part) for part in parts.values()}):
        _check_file(index.parent / name)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise _Damaged(f"{path.name} is missing")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # compares header and length
                return
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is None and path.name in (OPTIMIZER_FILE, SCHEDULER_FILE):
            broken = None if _is_state(path) else path.name
    except (
        OSError,
        SafetensorError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
    ) as error:
        raise _Damaged(f"{path.name} is damaged") from error
    if broken is not None:
        raise _Damaged(f"{path.name} is damaged")


def _is_state(path: Path) -> bool:
    """Whether the file holds the state of an optimizer or a scheduler; tensors are not read."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    wanted = {"state", "param_groups"} if path.name == OPTIMIZER_FILE else {"last_epoch"}
    return isinstance(state, dict) and wanted <= state.keys()
