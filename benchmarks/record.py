"""What is kept of a run: every sample, and everything needed to judge it. Plain JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 2


@dataclass
class Entry:
    """One provider in one contest.

    status: ``ok``, ``wrong`` (it gets no speed), ``failed`` or ``skipped``; ``reason`` says why.
    Errors are relative to the float64 oracle (the gradient's by the 2-norm). Samples are
    nanoseconds per call, one per round; cpu_ns sums over the threads.
    """

    provider: str
    family: str
    status: str = "ok"
    reason: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    inner: int = 1  #: calls per sample
    wall_ns: list[float] = field(default_factory=list)
    cpu_ns: list[float] = field(default_factory=list)


@dataclass
class Round:
    """What else the machine did during a round.

    foreign: share of all cores' time that other processes took; steal: share that the hypervisor
    took; load: the one-minute load average at its end.
    """

    order: list[str]
    seconds: float
    load: float
    foreign: float | None = None
    steal: float | None = None


@dataclass
class Contest:
    """One workload, all its contenders, round by round."""

    workload: dict[str, Any]
    entries: dict[str, Entry]
    rounds: list[Round] = field(default_factory=list)


@dataclass
class Memory:
    """Peak extra memory of one call, in a process of its own."""

    workload: dict[str, Any]
    provider: str
    status: str = "ok"
    reason: str = ""
    peak_bytes: int | None = None


@dataclass
class Run:
    machine: dict[str, Any]
    versions: dict[str, Any]
    options: dict[str, Any]
    bandwidth: list[dict[str, Any]] = field(default_factory=list)
    contests: list[Contest] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")


def load(path: Path) -> Run:
    raw = json.loads(path.read_text())
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {raw.get('schema')!r} is not {SCHEMA}")
    contests = [
        Contest(
            c["workload"],
            {name: Entry(**entry) for name, entry in c["entries"].items()},
            [Round(**r) for r in c["rounds"]],
        )
        for c in raw.pop("contests")
    ]
    memory = [Memory(**m) for m in raw.pop("memory")]
    return Run(contests=contests, memory=memory, **raw)
