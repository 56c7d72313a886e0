"""Folders that a command is to write into, checked before it works for hours."""

from __future__ import annotations

import os
from pathlib import Path


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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{option}: {str(folder)!r} exists and is not an empty folder")
    check_can_be_made(option, folder)
