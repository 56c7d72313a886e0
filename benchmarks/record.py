"""What is kept of a run: every sample, and everything needed to judge it. Plain JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, is_dataclass
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


def _contest(raw: dict[str, Any]) -> Contest:
    return Contest(
        raw["workload"],
        {name: Entry(**entry) for name, entry in raw["entries"].items()},
        [Round(**r) for r in raw["rounds"]],
    )


def load(path: Path) -> Run:
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r} is not {SCHEMA}")
    contests = [_contest(c) for c in raw.pop("contests")]
    memory = [Memory(**m) for m in raw.pop("memory")]
    return Run(contests=contests, memory=memory, **raw)


def append(path: Path, kind: str, value: Any) -> None:
    """Add a result to those of a run whose processes may be ended at any time: one line each.

    kind: ``about`` (a run without results), ``bandwidth``, ``contest``, ``memory``, or any other
    name, under which a list in the machine's description collects the values.
    """
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    line = json.dumps({"kind": kind, "value": plain}, allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as file:  # one write: processes beside do not cut it
        file.write(line.encode())


def collect(path: Path) -> Run:
    """The run that the lines of ``append`` describe."""
    run, others = Run({}, {}, {}), {}
    for line in path.read_text().splitlines():
        kind, value = (json.loads(line)[name] for name in ("kind", "value"))
        if kind == "about":
            run.machine, run.versions, run.options = (
                value[name] for name in ("machine", "versions", "options")
            )
        elif kind == "bandwidth":
            run.bandwidth.append(value)
        elif kind == "contest":
            run.contests.append(_contest(value))
        elif kind == "memory":
            run.memory.append(Memory(**value))
        else:
            others.setdefault(kind, []).append(value)
    run.machine |= others
    return run
