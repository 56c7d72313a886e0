"""ptxsim, the emulator that executes compiled PTX: found or skipped."""

from __future__ import annotations

from typing import Any

import pytest
import simulator


@pytest.fixture(scope="session")
def ptxsim() -> Any:
    """The emulator's module."""
    if reason := simulator.why_no_ptxsim():
        pytest.skip(reason)
    return simulator.ptxsim()
