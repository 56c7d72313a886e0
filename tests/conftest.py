"""Fixtures of every test: fixed seeds, poisoned memory, and one parameter for each backend."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch loads OpenMP: idle threads that spin make small problems 5x slower (measured) where
# the cores are shared. Nothing here measures time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import cases
import pytest
import torch

from kdkernels.backends import BACKENDS


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run on this machine; the others are skipped with their reasons."""
    reasons = BACKENDS[request.param].unavailable()
    if reasons:
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """The device whose tensors the backend takes."""
    return cases.device_of(backend)
