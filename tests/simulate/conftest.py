"""The simulated tests need nvcc and ptxsim; without them they are skipped with that reason."""

from __future__ import annotations

import pytest

import simulator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = simulator.why_not()
    if reason:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))
