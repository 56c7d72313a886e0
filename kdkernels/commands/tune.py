"""``kdkernels tune``: measure the Triton backend's launch numbers on this machine's GPU.

Nothing is tuned at a user's first step: without this command the policy's own numbers are used. The
winners are kept in a small JSON file, one entry for each device and kind of problem, and read when
the backend launches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch

from ..backends.triton import policy
from ..dtypes import DTYPES
from ..problem import Options, Problem

#: Rounds of one candidate that are timed, after as many that are not.
ROUNDS = 10


def candidates(
    chosen: policy.LaunchPolicy, device: policy.Device, rows: int
) -> list[policy.LaunchPolicy]:
    """The policy's own launch first, then its neighbours that keep every program resident."""
    found = [chosen]
    for warps in (4, 8, 16):
        # 65536 registers of a processor; where there is no limit on them, as many warps as chosen.
        room = 65536 // (32 * chosen.registers) if chosen.registers else 8 * chosen.residents
        residents = max(1, room // warps)
        for split in sorted({1, 2, 4, 8, 16, 32, chosen.split}):
            if split > device.processors * residents or (split > 1 and device.kind != "cuda"):
                continue
            waiting = "launch" if chosen.exchange == "launch" else "spin"
            exchange = waiting if split > 1 else "none"
            one = dataclasses.replace(
                chosen,
                num_warps=warps,
                residents=residents,
                split=split,
                exchange=exchange,
                programs=policy.programs_for(device, rows, residents, split, exchange),
            )
            if one not in found:
                found.append(one)
    return found


def _milliseconds(problem: Problem, launch_policy: policy.LaunchPolicy) -> float:
    """The median time of a forward with gradient."""
    from ..backends.triton import launch

    def once() -> None:
        launch.forward(problem, want_gradient=True, extras=False, launch_policy=launch_policy)

    for _ in range(ROUNDS):
        once()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        once()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def tune(problem: Problem) -> dict[str, Any]:
    """Measure all candidates for a problem on the GPU and keep the fastest in the cache file."""
    from ..backends.triton import launch

    swept = problem.options.divergence in launch.functors.SWEPT
    planned = launch.Launch(problem, launch.describe(problem.student), 2 + swept, None)
    device = planned.device
    chosen = policy.choose(device, **planned.facts)
    exact = launch.forward(problem, want_gradient=True, extras=False, launch_policy=chosen)
    timed = []
    for candidate in candidates(chosen, device, problem.rows):
        result = launch.forward(problem, want_gradient=True, extras=False, launch_policy=candidate)
        # A launch that computes something else is no candidate, however fast.
        torch.testing.assert_close(result.loss, exact.loss, rtol=1e-5, atol=1e-5)
        timed.append((_milliseconds(problem, candidate), candidate))
    best, winner = min(timed, key=lambda pair: pair[0])
    entry = {
        "milliseconds": best,
        "untuned_milliseconds": timed[0][0],
        "policy": dataclasses.asdict(winner),
    }
    path = policy.tuned_file()
    policy.all_tuned.cache_clear()
    known = policy.all_tuned() | {planned.key: entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")
    policy.all_tuned.cache_clear()
    return entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kdkernels tune``."""
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 50257, 128256, 151936])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"])
    parser.add_argument("--divergence", nargs="+", default=["forward_kl"])


def run(arguments: argparse.Namespace) -> int:
    """``kdkernels tune``; the exit status. ValueError on bad input."""
    from ..backends import BACKENDS
    from ..divergences import resolve

    for name in arguments.divergence:
        resolve(name, 0.5)
    for name, values in (("rows", [arguments.rows]), ("vocab", arguments.vocab)):
        if min(values) < 1:
            raise ValueError(f"{name}: {min(values)} is not at least 1")
    backend = BACKENDS["triton"]
    reasons = backend.unavailable()
    if reasons or not torch.cuda.is_available():
        print(f"tune: nothing to measure: {'; '.join(reasons) or 'there is no GPU'}")
        return 1
    for name in arguments.divergence:
        divergence = resolve(name, 0.5)
        options = Options(alpha=0.5, divergence=divergence.name, parameters=divergence.parameters)
        for dtype in arguments.dtype:
            for vocab in arguments.vocab:
                student, teacher = (
                    torch.randn(arguments.rows, vocab, device="cuda").to(DTYPES[dtype])
                    for _ in range(2)
                )
                labels = torch.randint(vocab, (arguments.rows,), device="cuda")
                problem = Problem(student, teacher, labels, None, None, options)
                entry = tune(problem)
                print(
                    f"{name} {dtype} V={vocab}: {entry['milliseconds']:.3f} ms, "
                    f"{entry['untuned_milliseconds']:.3f} ms untuned ({entry['policy']})"
                )
    print(f"kept in {policy.tuned_file()}")
    return 0
