"""ptxsim, the emulator that executes compiled PTX: found or skipped; and how much is run."""

from __future__ import annotations

import collections
import os
from typing import Any

import pytest
import simulator

#: Of a test with more cases than this only every third is run, unless all are asked for.
FEW_CASES = 12


def pytest_report_header() -> str | None:
    if simulator.WANTS_ALL:
        return None
    return f"tests/simulate: a third of the longest tests' cases; {simulator.ALL} runs every one"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if simulator.WANTS_ALL:
        return
    families = collections.defaultdict(list)
    for item in items:
        if os.path.dirname(__file__) == os.path.dirname(item.path):
            families[item.nodeid.split("[")[0]].append(item)
    dropped = {
        item for family in families.values() if len(family) > FEW_CASES
        for number, item in enumerate(family) if number % 3
    }  # fmt: skip
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=list(dropped))


@pytest.fixture(scope="session")
def ptxsim() -> Any:
    """The emulator's module."""
    if reason := simulator.why_no_ptxsim():
        pytest.skip(reason)
    return simulator.ptxsim()
