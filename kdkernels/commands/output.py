"""The output folder of a run: what may be written into it, and what of an earlier run goes.

Nothing but what a run has written is ever deleted or replaced, and nothing that this one reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training import checkpoints
from ..training.folders import check_can_be_made, content

#: Arm of the experiment -> folder of its training checkpoints.
ARM_FOLDERS = {
    "labels only": "labels-only",
    "output only": "output-only",
    "distilled": "distilled",
}
STUDENT_FOLDER = "student"
RESULTS = "results.json"
GEOMETRY_FILE = "geometry.png"
#: What a run writes beside the student; the picture of the geometry is an encoder's.
RESULT_FILES = (RESULTS, "loss.png", "report.md", "report.html")
#: All that a run leaves, and may replace.
RUN_NAMES = (STUDENT_FOLDER, *ARM_FOLDERS.values(), *RESULT_FILES, GEOMETRY_FILE)

#: Keys that tell the results of a run, or of a sweep, from other people's JSON.
_RUN_KEYS = {"rows", "configuration"}
#: Options that say where something is written, or how it is called.
_NO_INPUTS = ("output_dir", "logging_dir", "run_name", "project", "hub_model_id")


def check_output(
    output: Path, overwrite: bool, resume: str | None, options: dict[str, Any]
) -> None:
    """ValueError unless a run may write into ``output``.

    Args:
        resume: the option ``resume_from_checkpoint``.
        options: all that were given, and ``config``: what a run reads is named by one of them.
    """
    check_can_be_made("output_dir", output)
    check_resume(overwrite, resume)
    if resume is not None:
        arms = [output / arm for arm in ARM_FOLDERS.values()]
        if not any(map(checkpoints.numbered, arms)):
            raise ValueError(f"resume_from_checkpoint: no checkpoint in {str(output)!r}")
    elif not all(map(_is_left_empty, content(output))):
        check_replaced(output, overwrite, is_of_a_run(output))
    check_inputs(output, RUN_NAMES, options)


def check_resume(overwrite: bool, resume: str | None) -> None:
    """ValueError unless ``resume_from_checkpoint`` has a value that a command understands."""
    if resume is None:
        return
    if overwrite:
        raise ValueError("overwrite_output_dir: would delete what resume_from_checkpoint needs")
    if resume.lower() not in ("true", "last"):
        raise ValueError(
            f"resume_from_checkpoint: {resume!r} is not `true` (which goes on from the last "
            "checkpoints in output_dir)"
        )


def check_replaced(output: Path, overwrite: bool, ours: bool) -> None:
    """ValueError unless what is in the folder is to be replaced, and was made by this command."""
    if not overwrite:
        raise ValueError(
            f"output_dir: {str(output)!r} is not empty; choose another one, --overwrite_output_dir "
            "or --resume_from_checkpoint true"
        )
    if not ours:
        raise ValueError(
            f"overwrite_output_dir: {str(output)!r} was not made by kdkernels (no results, no "
            "checkpoints); choose another folder or empty it yourself"
        )


def is_of_a_run(output: Path) -> bool:
    """Whether an earlier run, finished or not, has written what this one would replace."""
    if any((output / name).is_symlink() for name in RUN_NAMES):
        return False
    if holds_keys(output / RESULTS, _RUN_KEYS):
        return True
    # An unfinished run leaves nothing but checkpoints.
    there = {entry.name for entry in content(output)} & set(RUN_NAMES)
    return bool(there) and all(_is_arm(output / name) for name in there)


def _is_left_empty(folder: Path) -> bool:
    """Whether a training was stopped here before its first checkpoint."""
    return folder.name in ARM_FOLDERS.values() and folder.is_dir() and not content(folder)


def _is_arm(folder: Path) -> bool:
    known = (*checkpoints.numbered(folder), folder / "runs")
    return folder.name in ARM_FOLDERS.values() and set(content(folder)) <= set(known)


def holds_keys(path: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object with these keys."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and keys <= found.keys()


def check_inputs(output: Path, names: Sequence[str], options: dict[str, Any]) -> None:
    """ValueError if an option names something that the run would replace, or part of it.

    Args:
        names: what in ``output`` is replaced.
    """
    replaced = [(output / name).resolve() for name in names if (output / name).exists()]
    for name, value in options.items():
        path = None if name in _NO_INPUTS else _existing(value)
        if path is None:
            continue
        for place in replaced:
            if path == place or place in path.parents or path in place.parents:
                raise ValueError(
                    f"output_dir: {str(place)!r} would be replaced, and {name} needs {value!r}; "
                    "choose another output_dir"
                )


def _existing(value: Any) -> Path | None:
    """The file or folder that the value of an option names, if it is one."""
    if not isinstance(value, str) or not value:
        return None
    try:
        path = Path(value).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a path, or no such home
        return None


def remove_checkpoints(output: Path) -> None:
    """Delete the checkpoints of an earlier run: a new one would take them for its own.

    Its student and its results stay until this run has better ones.
    """
    for name in ARM_FOLDERS.values():
        if (output / name).is_dir():
            shutil.rmtree(output / name)
