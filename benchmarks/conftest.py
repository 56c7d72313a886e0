"""Fixtures of the pytest-benchmark files: one workload's inputs and truth, shared by contenders."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from . import measure
from .providers import PROVIDERS, Provider
from .record import Entry
from .workloads import Inputs, Truth, Workload

Race = Callable[[Workload, str], None]


@functools.lru_cache(maxsize=1)
def _inputs(workload: Workload) -> Inputs:
    torch.compiler.reset()
    return workload.make()


@functools.lru_cache(maxsize=2)
def _truth(workload: Workload) -> Truth:
    return workload.oracle(_inputs(workload))


@pytest.fixture
def race(benchmark) -> Race:  # type: ignore[no-untyped-def]
    """Check a provider's result on a workload, then time it in the workload's group."""

    def run(workload: Workload, name: str) -> None:
        provider: Provider = PROVIDERS[name]
        reason = provider.absence(workload)
        if reason:
            pytest.skip(reason)
        step = provider.prepare(workload, _inputs(workload))
        entry = Entry(name, provider.family)
        bounds = measure.Bounds(workload.tolerance, workload.tolerance)
        measure.check(entry, step(), _truth(workload), bounds)
        if entry.status != "ok":
            pytest.fail(f"{name} on {workload.name}: {entry.reason}; it gets no speed")
        benchmark.group = workload.name
        benchmark.extra_info.update(
            bytes_moved=workload.bytes_moved,
            logits=workload.logits,
            loss_error=entry.loss_error,
            gradient_error=entry.gradient_error,
        )
        # Few rounds of large calls: pytest-benchmark's calibration would take minutes.
        small = workload.logits < 1 << 20
        benchmark.pedantic(
            step, warmup_rounds=1, rounds=20 if small else 5, iterations=20 if small else 1
        )

    return run
