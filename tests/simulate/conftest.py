"""ptxsim, the emulator that executes compiled PTX: found or skipped; and how much is run."""

from __future__ import annotations

import collections
import os
import random
from typing import Any

import pytest
import simulator

#: Of a test with more cases than this only a quarter is run, unless all are asked for.
FEW_CASES = 12


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not simulator.WANTS_ALL:
        terminalreporter.write_line(
            f"tests/simulate: a quarter of the longest tests' cases; {simulator.ALL} runs every one"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if simulator.WANTS_ALL:
        return
    families = collections.defaultdict(list)
    for item in items:
        if os.path.dirname(__file__) == os.path.dirname(item.path):
            families[item.nodeid.split("[")[0]].append(item)
    dropped: set[pytest.Item] = set()
    for family in families.values():
        if len(family) > FEW_CASES:
            # The same ones each time, and no period that would miss one value of a parameter.
            dropped.update(random.Random(0).sample(family, len(family) * 3 // 4))
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=list(dropped))


@pytest.fixture(scope="session")
def ptxsim() -> Any:
    """The emulator's module."""
    if reason := simulator.why_no_ptxsim():
        pytest.skip(reason)
    return simulator.ptxsim()
