"""Correctness first, then time: the contenders of one workload, interleaved in one process."""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import machine, memory
from .providers import Answer, Provider, Step
from .record import Contest, Entry, Memory, Round
from .workloads import Inputs, Truth, Workload

#: A sample lasts at least this long: short calls are repeated within it.
SAMPLE_SECONDS = 0.01


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| by the 2-norm, in float64; infinite for a wrong shape."""
    if value.shape != truth.shape:
        return math.inf
    # In slices: a float64 copy of a whole gradient would be the largest tensor of the run.
    difference = norm = 0.0
    pairs = zip(value.reshape(-1).split(1 << 20), truth.reshape(-1).split(1 << 20), strict=True)
    for part, true in pairs:
        difference += float((part.double() - true.double()).square().sum())
        norm += float(true.double().square().sum())
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


def _largest(errors: Iterable[float]) -> float:
    """The largest; NaN counts as infinite, max would lose it."""
    return max(math.inf if math.isnan(error) else error for error in errors)


class Bounds(NamedTuple):
    """The largest errors of a result that still gets a speed."""

    loss: float
    gradient: float


def check(entry: Entry, answer: Answer, truth: Truth, bounds: Bounds) -> None:
    """Fill in the errors; a result that is wrong takes the entry out of the race."""
    loss, gradients, rows = truth
    if answer.loss is not None:
        entry.loss_error = relative_error(answer.loss, loss)
    if gradients and answer.gradients is not None:
        same = len(answer.gradients) == len(gradients)
        given = (g if rows is None else g[rows] for g in answer.gradients)
        errors = map(relative_error, given, gradients)
        entry.gradient_error = _largest(errors) if same else math.inf
    for name, bound in (("loss_error", bounds.loss), ("gradient_error", bounds.gradient)):
        error = getattr(entry, name)
        if error is not None and not error <= bound:
            entry.status = "wrong"
            entry.reason = f"{name.replace('_', ' ')} {error:.3g} is above {bound:g}"
            if not math.isfinite(error):
                setattr(entry, name, None)


def timed(step: Step, calls: int, device: str) -> tuple[float, float]:
    """Wall and CPU nanoseconds per call. A call's results are released within the time.

    On a GPU "wall" is what passes there between an event before and one after all calls, and "CPU"
    is what the host spends on enqueuing them.
    """
    if device == "cuda":
        return _timed_by_events(step, calls)
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    for _ in range(calls):
        step()
    wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
    return wall / calls, cpu / calls


def _timed_by_events(step: Step, calls: int) -> tuple[float, float]:
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cpu = time.process_time_ns()
    first.record()
    for _ in range(calls):
        step()
    last.record()
    cpu = time.process_time_ns() - cpu
    last.synchronize()
    return first.elapsed_time(last) * 1e6 / calls, cpu / calls


def _prepared(
    workload: Workload, inputs: Inputs, providers: Iterable[Provider], bounds: Bounds
) -> tuple[dict[str, Entry], dict[str, Step]]:
    """Entries of all providers, and the steps of those that are correct."""
    entries: dict[str, Entry] = {}
    steps: dict[str, Step] = {}
    truths: dict[Workload, Truth] = {}
    for provider in providers:
        entry = entries[provider.name] = Entry(provider.name, provider.family)
        reason = provider.absence(workload)
        if reason:
            entry.status, entry.reason = "skipped", reason
            continue
        computed = provider.computes(workload)
        if computed not in truths:
            truths[computed] = computed.oracle(inputs)
        try:
            step = provider.prepare(computed, inputs)
            check(entry, step(), truths[computed], bounds)
        except Exception as error:  # a contender that cannot run is a result, not an end
            entry.status = "failed"
            entry.reason = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        if entry.status == "ok":
            steps[provider.name] = step
    return entries, steps


def contest(
    workload: Workload,
    providers: Iterable[Provider],
    rounds: int,
    device: str = "cpu",
    seed: int = 0,
    *,
    bounds: Bounds | None = None,
    peaks: list[Memory] | None = None,
) -> Contest:
    """Run all providers on one workload: check, warm up, then time in a new order each round.

    bounds: default: the workload's tolerance.
    peaks: what gets the peak memory of each correct one; on a GPU only.
    """
    # Otherwise the workloads before count as recompilations of the same code, and beyond the eighth
    # torch.compile silently runs it eagerly.
    torch.compiler.reset()
    inputs = workload.make(device)
    bounds = bounds or Bounds(workload.tolerance, workload.tolerance)
    entries, steps = _prepared(workload, inputs, providers, bounds)
    declared = ("logits", "bytes_moved", "flops", "subject")
    result = Contest(
        {**vars(workload), **{name: getattr(workload, name) for name in declared}}, entries
    )
    if device == "cuda" and peaks is not None:
        for name, step in steps.items():
            if entries[name].family in ("variant", "graph"):  # as another provider's
                continue
            found = memory.peak_extra(step, device)
            peaks.append(Memory(dict(vars(workload)), name, peak_bytes=found))
    for name, step in steps.items() if rounds else ():
        wall, _ = timed(step, 2, device)
        entries[name].inner = max(1, math.ceil(SAMPLE_SECONDS * 1e9 / wall))
    shuffle = random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds if steps else 0):
            gc.collect()
            order = list(steps)
            shuffle(order)
            before = machine.ticks()
            start = time.perf_counter()
            for name in order:
                wall, cpu = timed(steps[name], entries[name].inner, device)
                entries[name].wall_ns.append(wall)
                entries[name].cpu_ns.append(cpu)
            seconds = time.perf_counter() - start
            foreign, steal = machine.disturbance(before, machine.ticks())
            result.rounds.append(Round(order, seconds, os.getloadavg()[0], foreign, steal))
    finally:
        if collecting:
            gc.enable()
    return result
