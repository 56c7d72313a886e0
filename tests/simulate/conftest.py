"""ptxsim, the emulator that executes compiled PTX: found or skipped; and how much is run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import sampling
import simulator

#: Of a test with more cases than this only a quarter is run, unless all are asked for.
FEW_CASES = 12


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not sampling.WANTS_ALL:
        terminalreporter.write_line(
            f"tests/simulate: a quarter of the longest tests' cases; {sampling.ALL} runs every one"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sampling.keep_some(
        config, items, FEW_CASES, 4, lambda i: os.path.dirname(__file__) == os.path.dirname(i.path)
    )


@pytest.fixture(scope="session")
def ptxsim() -> Any:
    """The emulator's module."""
    if reason := simulator.why_no_ptxsim():
        pytest.skip(reason)
    return simulator.ptxsim()
