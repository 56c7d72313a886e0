"""Fixtures of every test: fixed seeds, poisoned memory, and one parameter for each backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# Before torch loads OpenMP: idle threads that spin make small problems 5x slower (measured) where
# the cores are shared. Nothing here measures time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import cases
import pytest
import sampling
import torch

from kdkernels.backends import BACKENDS

#: Why a backend cannot run on this machine. Its tests, two fifths of all, are not collected.
MISSING = {name: reasons for name, one in BACKENDS.items() if (reasons := one.unavailable())}


#: In Triton's interpreter a case takes up to seconds: of a test with more cases than this a third
#: is run.
INTERPRETED_CASES = 100


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if is_interpreted() and not sampling.WANTS_ALL:
        terminalreporter.write_line(
            f"in the interpreter a third of the longest tests' cases; {sampling.ALL} runs every one"
        )
    for name, reasons in MISSING.items():
        terminalreporter.write_line(f"no test of the backend {name}: {'; '.join(reasons)}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_interpreted():
        sampling.keep_some(config, items, INTERPRETED_CASES, 3)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = previous


@pytest.fixture(params=[name for name in BACKENDS if name not in MISSING])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run on this machine."""
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """The device whose tensors the backend takes."""
    return cases.device_of(backend)
