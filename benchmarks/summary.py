"""Numbers from a :class:`~benchmarks.record.Run`: medians, ratios, floors, targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .record import Contest, Entry, Memory, Run

#: A round is quiet if other processes and the hypervisor took no more than these shares.
QUIET_FOREIGN = 0.05
QUIET_STEAL = 0.02
#: With this many quiet rounds, only those count.
ENOUGH_ROUNDS = 5

EPSILONS = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}


class Spread(NamedTuple):
    """Median and inter-quartile range."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread | None:
    if not samples:
        return None
    if len(samples) == 1:
        return Spread(*samples * 3)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high)


def quiet_rounds(contest: Contest) -> list[int]:
    return [
        i
        for i, r in enumerate(contest.rounds)
        if (r.foreign or 0.0) <= QUIET_FOREIGN and (r.steal or 0.0) <= QUIET_STEAL
    ]


def used_rounds(contest: Contest) -> list[int]:
    """The quiet rounds if there are enough of them, else all."""
    quiet = quiet_rounds(contest)
    return quiet if len(quiet) >= ENOUGH_ROUNDS else list(range(len(contest.rounds)))


def samples(contest: Contest, provider: str, clock: str = "wall_ns") -> list[float]:
    """Nanoseconds per call in the rounds that count; empty if the provider has no speed."""
    entry = contest.entries.get(provider)
    if entry is None or entry.status != "ok" or not entry.wall_ns:
        return []
    times: list[float] = getattr(entry, clock)
    return [times[i] for i in used_rounds(contest)]


def ratio(contest: Contest, slow: str, fast: str, clock: str = "wall_ns") -> Spread | None:
    """How many times faster ``fast`` is, taken round by round."""
    pairs = zip(samples(contest, slow, clock), samples(contest, fast, clock), strict=False)
    return spread([a / b for a, b in pairs])


def refused(entry: Entry) -> bool:
    """Whether it says of itself that it cannot compute this: a kernel forced where it cannot be."""
    return entry.status == "failed" and "cannot run this problem" in entry.reason


def subject(contest: Contest) -> str:
    """The provider that the others are compared with."""
    return str(contest.workload["subject"])


def fastest(contest: Contest, *families: str) -> str | None:
    """The provider with the lowest median among those that are correct."""
    medians = {
        name: found.median
        for name, entry in contest.entries.items()
        if entry.family in families and (found := spread(samples(contest, name)))
    }
    return min(medians, key=medians.__getitem__, default=None)


def per_logit(run: Run, contest: Contest, provider: str, clock: str = "wall_ns") -> float | None:
    """Median ns per logit; of the CPU clock divided by the threads."""
    found = spread(samples(contest, provider, clock))
    if found is None:
        return None
    parts = run.options["threads"] if clock == "cpu_ns" else 1
    return found.median / contest.workload["logits"] / parts


def on_gpu(run: Run) -> bool:
    """Whether it is a GPU's run, or a rehearsal of one."""
    return run.options.get("device") == "cuda" or bool(run.options.get("dry"))


def kernel_clock(run: Run) -> str:
    """The clock of a kernel alone: cores that others took do not count, a GPU has its own."""
    return "wall_ns" if on_gpu(run) else "cpu_ns"


def ceiling(run: Run, contest: Contest) -> float:
    """GB/s that a workload is held to: the machine's copies, or a GPU's two reads and a write."""
    if not on_gpu(run):
        return copy_bandwidth(run)
    half = contest.workload["dtype"] != "fp32"
    rates = {b["name"]: b["median"] for b in run.bandwidth}
    rate: float = rates.get("add_bf16" if half else "add", rates.get("add", 0.0))
    return rate


def rate(contest: Contest, provider: str) -> float | None:
    """GB/s of the declared bytes."""
    found = spread(samples(contest, provider))
    return contest.workload["bytes_moved"] / found.median if found else None


def copy_bandwidth(run: Run) -> float:
    """GB/s: the best median of the machine's own copies with all threads, 0 if not measured."""
    threads = run.options["threads"]
    return max((b["median"] for b in run.bandwidth if b["threads"] == threads), default=0.0)


def floor_per_logit(run: Run, contest: Contest) -> float | None:
    """ns per logit that moving the declared bytes takes at the machine's bandwidth.

    None where arithmetic sets the floor: from hidden states, that of the provider "products".
    """
    if contest.workload["hidden"]:
        return None
    best = ceiling(run, contest)
    return contest.workload["bytes_moved"] / contest.workload["logits"] / best if best else None


def bandwidth_share(run: Run, contest: Contest, provider: str) -> float | None:
    """Share of the machine's bandwidth that a provider's declared bytes reach."""
    floor, time = floor_per_logit(run, contest), per_logit(run, contest, provider)
    return floor / time if floor and time else None


def flop_rate(contest: Contest, provider: str) -> float | None:
    """GFLOP/s of the matrix products alone, the time being that of the whole call."""
    found = spread(samples(contest, provider))
    return contest.workload["flops"] / found.median if found else None


def contests(run: Run, *groups: str) -> Iterator[Contest]:
    for contest in run.contests:
        if contest.workload["name"].split("/")[0] in groups:
            yield contest


def case(workload: dict[str, object]) -> str:
    return str(workload["name"])


# --- targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One line of "What it must reach": a bound on the worst case of ``measured``."""

    name: str
    bound: float
    unit: str
    measured: Callable[[Run], dict[str, float]]
    at_least: bool = False
    aim: float | None = None


@dataclass(frozen=True)
class Verdict:
    target: Target
    cases: dict[str, float] = field(default_factory=dict)

    def _worst_case(self) -> str:
        pick = min if self.target.at_least else max
        return pick(self.cases, key=self.cases.__getitem__)

    @property
    def worst(self) -> tuple[str, float] | None:
        return (self._worst_case(), self.cases[self._worst_case()]) if self.cases else None

    def fulfilled(self) -> list[str]:
        """Names of the cases within the bound."""
        bound = self.target.bound
        return [
            name
            for name, value in self.cases.items()
            if (value >= bound if self.target.at_least else value <= bound)
        ]


def _speedups(families: tuple[str, ...], dtypes: Sequence[str]) -> Callable[[Run], dict]:
    def measured(run: Run) -> dict[str, float]:
        out = {}
        for contest in contests(run, "kd_ce"):
            rival = fastest(contest, *families)
            found = ratio(contest, rival, "fused") if rival else None
            if found and contest.workload["dtype"] in dtypes:
                out[case(contest.workload)] = found.median
        return out

    return measured


def _kernel_cost(dtypes: Sequence[str]) -> Callable[[Run], dict]:
    def measured(run: Run) -> dict[str, float]:
        found = {
            case(c.workload): per_logit(run, c, "kernel", "cpu_ns")
            for c in contests(run, "kd_ce")
            if c.workload["dtype"] in dtypes
        }
        return {name: value for name, value in found.items() if value is not None}

    return measured


def _divergence_cost(run: Run) -> dict[str, float]:
    found = {
        case(c.workload): ratio(c, "kernel", "kernel_forward_kl")
        for c in contests(run, "divergence")
    }
    return {name: value.median for name, value in found.items() if value}


def _call_cost(run: Run) -> dict[str, float]:
    found = {case(c.workload): spread(samples(c, "fused")) for c in contests(run, "call")}
    return {name: value.median / 1e3 for name, value in found.items() if value}


def gradient_bytes(memory: Memory) -> int:
    """Bytes of the gradients: as large as the logits, or as hidden states and weight."""
    workload = memory.workload
    itemsize = 4 if workload["dtype"] == "fp32" else 2
    rows, vocab, hidden = (workload[name] for name in ("rows", "vocab", "hidden"))
    return itemsize * (hidden * (rows + vocab) if hidden else rows * vocab)


def _memory(run: Run) -> dict[str, float]:
    """Peak extra beyond the gradient, in units of 12 bytes * vocab * threads of scratch."""
    out = {}
    for memory in run.memory:
        given = not memory.workload["hidden"]
        if memory.provider == "fused" and given and memory.peak_bytes is not None:
            beyond = memory.peak_bytes - gradient_bytes(memory)
            scratch = 12 * memory.workload["vocab"] * run.options["threads"]
            out[case(memory.workload)] = beyond / scratch
    return out


def chunks_beyond_gradients(run: Run, memory: Memory) -> float | None:
    """Peak extra beyond the gradients, in units of the default budget for tiles of logits."""
    if memory.peak_bytes is None:
        return None
    beyond: float = memory.peak_bytes - gradient_bytes(memory)
    return beyond / run.options["max_chunk_bytes"]


def _linear_memory(run: Run) -> dict[str, float]:
    found = {
        case(m.workload): chunks_beyond_gradients(run, m)
        for m in run.memory
        if m.provider == "fused_linear"
    }
    return {name: value for name, value in found.items() if value is not None}


def _times(group: str, slow: str, fast: str, *dtypes: str) -> Callable[[Run], dict]:
    def measured(run: Run) -> dict[str, float]:
        found = {
            case(c.workload): ratio(c, slow, fast)
            for c in contests(run, group)
            if c.workload["dtype"] in dtypes
        }
        return {name: value.median for name, value in found.items() if value}

    return measured


def _excess(name: str) -> Callable[[Run], dict]:
    """Error of the fused loss less eager's in the same dtype, in units of the dtype's epsilon."""

    def error(entry: Entry | None) -> float | None:
        return getattr(entry, name) if entry and entry.status == "ok" else None

    def measured(run: Run) -> dict[str, float]:
        out = {}
        for contest in contests(run, "kd_ce", "peer", "divergence", "call"):
            own = error(contest.entries.get("fused"))
            eager = [
                e for p in ("eager", "eager_log_target") if (e := error(contest.entries.get(p)))
            ]
            if own is not None and eager:
                epsilon = EPSILONS[contest.workload["dtype"]]
                out[case(contest.workload)] = (own - min(eager)) / epsilon
        return out

    return measured


def _gpu_milliseconds(card: str) -> Callable[[Run], dict]:
    """Of the call that the README is about, on that card."""

    def measured(run: Run) -> dict[str, float]:
        if card not in str(run.machine.get("device")):
            return {}
        found = {
            case(c.workload): spread(samples(c, "fused"))
            for c in contests(run, "kd_ce")
            if c.workload["name"] == "kd_ce/bf16/8192x128256/T2"
        }
        return {name: value.median / 1e6 for name, value in found.items() if value}

    return measured


def _gpu_speedups(*families: str) -> Callable[[Run], dict]:
    def measured(run: Run) -> dict[str, float]:
        pairs = {case(c.workload): (c, fastest(c, *families)) for c in contests(run, "peer")}
        found = {name: rival and ratio(c, rival, "fused") for name, (c, rival) in pairs.items()}
        return {name: value.median for name, value in found.items() if value}

    return measured


def _gpu_linear(run: Run) -> dict[str, float]:
    found = {
        case(c.workload): ratio(c, "fused_linear", "bare_products") for c in contests(run, "linear")
    }
    return {name: value.median for name, value in found.items() if value}


_HALF = ("bf16", "fp16")
_ALL = ("fp32", *_HALF)

TARGETS = (
    Target(
        "vs fastest eager, fp32 (12 if busy)", 20, "x", _speedups(("eager",), ("fp32",)), True, 30
    ),
    Target(
        "vs fastest eager, bf16 (12 if busy)", 20, "x", _speedups(("eager",), ("bf16",)), True, 25
    ),
    Target(
        "vs fastest eager, fp16 (12 if busy)", 20, "x", _speedups(("eager",), ("fp16",)), True, 25
    ),
    Target("vs best torch.compile", 10, "x", _speedups(("compile",), _ALL), True, 12),
    Target("kernel, reused gradient, fp32", 0.60, "ns/logit", _kernel_cost(("fp32",)), aim=0.42),
    Target("kernel, reused gradient, half", 0.50, "ns/logit", _kernel_cost(_HALF), aim=0.36),
    Target("divergence vs forward KL (kernel)", 2.0, "x", _divergence_cost),
    Target("whole call on [8, 1000]", 190, "us", _call_cost, aim=80),
    Target("peak memory beyond the gradient", 1.5, "scratch", _memory),
    Target(
        "linear vs bare products + loss, fp32",
        1.15,
        "x",
        _times("linear", "fused_linear", "products", "fp32"),
    ),
    Target(
        "linear vs materialised + eager, fp32",
        1.65,
        "x",
        _times("linear", "eager", "fused_linear", "fp32"),
        True,
        2,
    ),
    Target(
        "linear vs materialised + eager, bf16",
        20,
        "x",
        _times("linear", "eager", "fused_linear", "bf16"),
        True,
    ),
    Target(
        "64 entries of a teacher vs all",
        0.75,
        "x",
        _times("topk", "fused_topk", "fused_dense", "fp32", "bf16"),
    ),
    Target(
        "64 entries of a teacher vs eager, fp32",
        15,
        "x",
        _times("topk", "eager_topk", "fused_topk", "fp32"),
        True,
    ),
    Target("linear peak memory beyond the gradients", 1.05, "chunks", _linear_memory, aim=1),
    Target("loss error above eager's", 4, "eps", _excess("loss_error")),
    Target("gradient error above eager's", 4, "eps", _excess("gradient_error")),
)


GPU_TARGETS = (
    Target("8192 x 128256 bf16 on an H100", 2.35, "ms", _gpu_milliseconds("H100")),
    Target("8192 x 128256 bf16 on an H200", 1.95, "ms", _gpu_milliseconds("H200")),
    Target("vs best torch.compile", 5, "x", _gpu_speedups("compile"), True),
    Target("vs fastest eager", 15, "x", _gpu_speedups("eager", "upcast"), True),
    Target("linear vs bare products", 1.15, "x", _gpu_linear),
    Target("loss error above eager's", 4, "eps", _excess("loss_error")),
    Target("gradient error above eager's", 4, "eps", _excess("gradient_error")),
)


def verdicts(run: Run) -> list[Verdict]:
    targets = GPU_TARGETS if on_gpu(run) else TARGETS
    return [Verdict(target, target.measured(run)) for target in targets]
