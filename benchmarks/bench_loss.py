"""``pytest benchmarks``: the quick suite's workloads, all contenders, grouped by workload.

The runner (``python -m benchmarks``) is the instrument whose numbers count: it interleaves the
contenders. This file is for comparing two commits with pytest-benchmark's own storage.
"""

from __future__ import annotations

import pytest

from .providers import PROVIDERS
from .workloads import LINEAR_PROVIDERS, Workload, suite

_WORKLOADS = suite(quick=True)


#: Of other groups: the yardstick of the divergences, and what starts from hidden states.
_OTHERS = {p.name for p in PROVIDERS.values() if p.family in ("linear", "chunk", "products")} | {
    "kernel_forward_kl"
}


def _named(*groups: str) -> list[Workload]:
    return [w for w in _WORKLOADS if w.group in groups]


@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p not in _OTHERS])
@pytest.mark.parametrize("workload", _named("kd_ce"), ids=lambda w: w.name)
def bench_forward_backward(race, workload, provider):
    race(workload, provider)


@pytest.mark.parametrize("provider", ["fused", "kernel", "eager", "compile"])
@pytest.mark.parametrize("workload", _named("call", "forward"), ids=lambda w: w.name)
def bench_call(race, workload, provider):
    race(workload, provider)


@pytest.mark.parametrize("provider", ["fused", "kernel", "eager_log_target"])
@pytest.mark.parametrize("workload", _named("divergence"), ids=lambda w: w.name)
def bench_divergence(race, workload, provider):
    race(workload, provider)


@pytest.mark.parametrize("provider", LINEAR_PROVIDERS)
@pytest.mark.parametrize("workload", _named("linear"), ids=lambda w: w.name)
def bench_linear(race, workload, provider):
    race(workload, provider)
