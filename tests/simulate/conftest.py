"""ptxsim, the emulator that executes compiled PTX: found or skipped."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ptxsim() -> Any:
    """The module, from the folder in KDKERNELS_PTXSIM or ``../shared`` beside the checkout."""
    named = os.environ.get("KDKERNELS_PTXSIM")
    folder = Path(named) if named else Path(__file__).parents[3] / "shared" / "ptxsim"
    if not (folder / "sim.py").exists():
        pytest.skip(f"ptxsim is not at {folder} (KDKERNELS_PTXSIM names its folder)")
    sys.path.insert(0, str(folder.parent))
    try:
        return importlib.import_module(folder.name)
    finally:
        sys.path.pop(0)
