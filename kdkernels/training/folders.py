"""What a command leaves on disk: checked before hours of work, and whole or not there at all."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

#: How the names of what is being written begin; a killed command may leave one.
PARTIAL = ".kdkernels-"


def check_can_be_made(option: str, folder: Path) -> None:
    """ValueError, naming ``option``, unless ``folder`` is a writable folder or can become one."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{option}: {str(folder)!r}: {str(place)!r} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: {str(folder)!r} cannot be written: no permission in {place}")


def check_new(option: str, folder: Path) -> None:
    """:func:`check_can_be_made`, and ValueError if the folder holds something."""
    if folder.exists() and (not folder.is_dir() or content(folder)):
        raise ValueError(f"{option}: {str(folder)!r} exists and is not an empty folder")
    check_can_be_made(option, folder)


def content(folder: Path) -> list[Path]:
    """What a folder holds, but for what a killed command has left half-written."""
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if not entry.name.startswith(PARTIAL)]


def _make(folder: Path) -> list[Path]:
    """Make ``folder``; returns those of its parents and itself that did not exist, outermost first.

    OSError: it cannot be made, and nothing has been.
    """
    missing: list[Path] = []
    place = folder.absolute()
    while not place.exists():
        missing.insert(0, place)
        place = place.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        _unmake(missing)
        raise
    return missing


def _unmake(made: list[Path]) -> None:
    """Remove what :func:`_make` has made, as far as it is empty."""
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def on_trial(folder: Path) -> Iterator[Path]:
    """A folder inside ``folder`` to write into, to see whether it works; nothing of it stays."""
    made = _make(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL) as scratch:
            yield Path(scratch)
    finally:
        _unmake(made)


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of ``folder`` when that is done.

    Until then, and whatever goes wrong, ``folder`` stays as it is; one that is not there is not
    made. An empty one is kept (it may be where a disk is mounted) and filled.
    """
    target = Path(os.path.realpath(folder))
    made = _make(target.parent)
    fills = target.is_dir() and not content(target)
    try:
        # The inner folder, unlike the temporary one around it, has the user's permissions.
        place = target if fills else target.parent
        with tempfile.TemporaryDirectory(dir=place, prefix=PARTIAL) as scratch:
            new = Path(scratch) / target.name
            new.mkdir()
            yield new
            if not fills:
                _replace(target, new)
                return
            for entry in sorted(new.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):
                entry.rename(target / entry.name)
    except BaseException:
        _unmake(made)
        raise


def _replace(target: Path, new: Path) -> None:
    """Put ``new`` in the place of ``target``; what was there goes beside where ``new`` was."""
    if not target.exists():
        new.rename(target)
        return
    old = new.with_name(f"{new.name}.old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise


@contextlib.contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` when that is done."""
    place = Path(os.path.realpath(path))
    partial = place.with_name(f"{PARTIAL}{place.name}")
    try:
        yield partial
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that is the old one or the whole new one at any time."""
    with written_file(path) as new:
        # A file name that is no Unicode text has characters that UTF-8 cannot hold.
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """:func:`write_text` of ``value`` as JSON that every parser reads: see :func:`plain`."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """``value`` of nothing but what JSON and YAML have: null for NaN and infinite numbers.

    Enumerations become their values, other objects (paths, dtypes) their text.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if hasattr(value, "tolist"):  # of torch or numpy
        return plain(value.tolist())
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
