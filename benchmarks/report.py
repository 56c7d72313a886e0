"""Tables and plots, from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import summary
from .record import Contest, Memory, Run
from .summary import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = (
    "workload",
    "fused",
    "ns/logit",
    "kernel ns/logit",
    "of copy bw",
    "x eager",
    "x eager log_target",
    "x eager fp32",
    "x compile",
    "x chunked",
    "error loss / grad",
    "eager's",
)


def markdown(run: Run) -> str:
    """The whole report."""
    parts = [
        _headline(run),
        "Times are medians [inter-quartile range] of one call, ratios are medians of the ratios "
        "taken round by round, errors are relative to float64.",
        *(_gpu_sections(run) if summary.on_gpu(run) else _given_sections(run)),
        *_linear_sections(run),
        "## Targets",
        _target_table(run),
        "## Every contender",
        *(_detail(run, contest) for contest in run.contests if contest.rounds),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up when read as text."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _headline(run: Run) -> str:
    machine, versions, options = run.machine, run.versions, run.options
    changed = " plus uncommitted changes" if versions.get("changed") else ""
    rounds = [r for contest in run.contests for r in contest.rounds]
    quiet = sum(len(summary.quiet_rounds(contest)) for contest in run.contests)
    loads = [r.load for r in rounds] or [0.0]
    forced = " (forced)" if machine.get("kernel_isa_forced") else ""
    rates = "; ".join(
        f"{b['name']} {b['threads']} thread(s) {b['median']:.1f} (best {b['best']:.1f})"
        for b in run.bandwidth
    )
    lines = [
        f"# Benchmark of {versions['date']}",
        "",
        f"- machine: {machine['cpu']} (family, model {machine['family_model']}), "
        f"{machine['cores']} cores, {options['threads']} threads, device {machine['device']}, "
        f"huge pages `{machine['huge_pages']}`",
        f"- caches: {', '.join(machine['caches'])}",
        f"- instruction set: kernel {machine['kernel_isa']}{forced}, torch {machine['torch_isa']}",
        f"- versions: {', '.join(f'{k} {v}' for k, v in versions.items() if _is_version(k, v))}; "
        f"commit {versions['commit'][:10]}{changed}",
        f"- {quiet} of {len(rounds)} rounds were quiet (others took <= "
        f"{summary.QUIET_FOREIGN:.0%}, the hypervisor <= {summary.QUIET_STEAL:.0%}); "
        f"load {min(loads):.1f} to {max(loads):.1f}; a contest with fewer than "
        f"{summary.ENOUGH_ROUNDS} quiet rounds uses all of its rounds",
        f"- memory bandwidth, GB/s read + written: {rates or 'not measured'}",
    ]
    return "\n".join(lines)


def _is_version(name: str, value: Any) -> bool:
    return name not in ("commit", "changed", "date") and value is not None


def _time(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.2f} ms" if nanoseconds >= 1e6 else f"{nanoseconds / 1e3:.1f} us"


def _range(found: Spread | None) -> str:
    if found is None:
        return "-"
    unit, scale = ("ms", 1e6) if found.median >= 1e6 else ("us", 1e3)
    median, low, high = (value / scale for value in found)
    return f"{median:.2f} [{low:.2f}, {high:.2f}] {unit}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _times(contest: Contest, rival: str | None, clock: str = "wall_ns", digits: int = 1) -> str:
    """How many times more than the call that the contest is about the rival takes."""
    found = summary.ratio(contest, rival, summary.subject(contest), clock) if rival else None
    if found is None:
        return "-"
    median, low, high = (format(value, f".{digits}f") for value in found)
    return f"{median} [{low}, {high}]"


def _errors(contest: Contest, provider: str) -> str:
    entry = contest.entries.get(provider)
    if entry is None or entry.status not in ("ok", "wrong"):
        return "-"
    return f"{_number(entry.loss_error, '.0e')} / {_number(entry.gradient_error, '.0e')}"


def _speed_table(run: Run, timed: Sequence[Contest]) -> str:
    rows = []
    for contest in timed:
        kernel = summary.per_logit(run, contest, "kernel", "cpu_ns")
        rows.append(
            [
                summary.case(contest.workload),
                _range(summary.spread(summary.samples(contest, "fused"))),
                _number(summary.per_logit(run, contest, "fused")),
                _number(kernel),
                _number(summary.bandwidth_share(run, contest, "fused"), ".0%"),
                *(_times(contest, rival) for rival in ("eager", "eager_log_target", "eager_fp32")),
                _times(contest, summary.fastest(contest, "compile")),
                _times(contest, summary.fastest(contest, "chunked")),
                _errors(contest, "fused"),
                _errors(contest, "eager_log_target"),
            ]
        )
    return table(_COLUMNS, rows)


def _given_sections(run: Run) -> list[str]:
    """Time and memory of the loss on given logits."""
    given = [c for c in run.contests if not c.workload["hidden"]]
    timed = [c for c in given if not c.workload.get("entries")]  # older runs have none
    sparse = [c for c in given if c.workload.get("entries")]
    memory = [m for m in run.memory if not m.workload["hidden"]]
    parts = []
    if timed:
        parts += [
            "## Speed",
            "`x name` is how many times faster the fused call is. `kernel`: the native entry with "
            "a reused gradient buffer, CPU time / threads.",
            _speed_table(run, timed),
        ]
    if sparse:
        parts += ["## A teacher of a few entries a row", _sparse_table(run, sparse)]
    if memory:
        parts += ["## Peak extra memory", _memory_table(memory)]
    return parts


def _sparse_table(run: Run, timed: Sequence[Contest]) -> str:
    """Of ``dense`` more is more: how many times longer a whole teacher takes."""
    rows = []
    for contest in timed:
        rows.append(
            [
                summary.case(contest.workload),
                _range(summary.spread(summary.samples(contest, "fused_topk"))),
                _number(summary.bandwidth_share(run, contest, "fused_topk"), ".0%"),
                _times(contest, "fused_dense", digits=2),
                _times(contest, "eager_topk"),
                _errors(contest, "fused_topk"),
                _errors(contest, "eager_topk"),
            ]
        )
    names = ("case", "fused_topk", "of copy bw", "x dense", "x eager", "error", "eager's error")
    return table(names, rows)


#: Sections of a GPU's report: group of workloads, title.
_GPU_SECTIONS = (
    ("kd_ce", "Speed"),
    ("peer", "Beside the others"),
    ("divergence", "Divergences"),
    ("mixed", "Student and teacher in two formats, or aligned differently"),
    ("variant", "Kernels and cluster sizes, forced"),
)


def _gpu_sections(run: Run) -> list[str]:
    """What a GPU's run says of the loss on given logits."""
    parts = ["Times are the device's, between events; shares are those of its own bandwidth for "
             "two reads and a write.", _right(run)]  # fmt: skip
    for group, title in _GPU_SECTIONS:
        if found := list(summary.contests(run, group)):
            parts += [f"## {title}", _grid(found, lambda c, name: _bandwidth_cell(run, c, name))]
    if found := list(summary.contests(run, "small")):
        parts += [
            "## Small batches",
            "In brackets the time that the host spends on enqueuing a call. `graph`: a replay of "
            "the same kernels as a CUDA graph.",
            _grid(found, _host_cell),
        ]
    if memory := [m for m in run.memory if not m.workload["hidden"]]:
        parts += ["## Peak extra memory", _memory_table(memory)]
    return parts


def _right(run: Run) -> str:
    """How many results of the smoke test were right, and which were not."""
    entries = [
        (c.workload["name"], e)
        for c in summary.contests(run, "smoke")
        for e in c.entries.values()
        if e.status != "skipped"
    ]
    if not entries:
        return ""
    right = sum(e.status == "ok" for _, e in entries)
    refused = [e for _, e in entries if summary.refused(e)]
    lines = [
        f"- {name}, {e.provider}: {e.status}: {e.reason}"
        for name, e in entries
        if e.status != "ok" and not summary.refused(e)
    ]
    text = f"Every kernel against float64: {right} results right, {len(refused)} refused by name"
    return "\n".join([f"{text}, {len(lines)} wrong or failed.", *([""] if lines else []), *lines])


def _grid(found: Sequence[Contest], cell: Callable[[Contest, str], str]) -> str:
    """Workloads by providers."""
    names = list(dict.fromkeys(n for c in found for n, e in c.entries.items() if e.wall_ns))
    rows = [[summary.case(c.workload), *(cell(c, name) for name in names)] for c in found]
    return table(["workload", *names], rows)


def _bandwidth_cell(run: Run, contest: Contest, name: str) -> str:
    found = summary.spread(summary.samples(contest, name))
    if not found:
        entry = contest.entries.get(name)
        return "-" if entry is None or entry.status == "skipped" else entry.status
    share = _number(summary.bandwidth_share(run, contest, name), ".0%")
    return f"{_time(found.median)}, {_number(summary.rate(contest, name), '.0f')} GB/s, {share}"


def _flops_cell(contest: Contest, name: str) -> str:
    found, flops = summary.spread(summary.samples(contest, name)), summary.flop_rate(contest, name)
    return f"{_time(found.median)}, {flops / 1e3:.0f} TFLOP/s" if found and flops else "-"


def _host_cell(contest: Contest, name: str) -> str:
    found, host = (
        summary.spread(summary.samples(contest, name, clock)) for clock in ("wall_ns", "cpu_ns")
    )
    return f"{_time(found.median)} ({_time(host.median)})" if found and host else "-"


def digest(run: Run) -> str:
    """A line a contender, to be read in a terminal."""
    lines = [_right(run)]
    lines += [f"{b['name']}: {b['median']:.0f} GB/s" for b in run.bandwidth]
    for contest in run.contests:
        for name, entry in contest.entries.items():
            found = summary.spread(summary.samples(contest, name))
            if found:
                share = _number(summary.bandwidth_share(run, contest, name), ".0%")
                cost = f"{_time(found.median)} {_number(summary.rate(contest, name), '.0f')} GB/s"
                lines.append(f"{summary.case(contest.workload):32} {name:22} {cost} {share}")
            elif contest.rounds and entry.status in ("wrong", "failed"):
                lines.append(
                    f"{summary.case(contest.workload):32} {name:22} {entry.status}: {entry.reason}"
                )
    return "\n".join([*filter(None, lines), "", _target_table(run)])


#: Columns of the table of the loss from hidden states: header, provider.
_LINEAR_RIVALS = (
    ("x products + loss", "products"),
    ("x logits + fused", "fused"),
    ("x logits + eager", "eager"),
    ("x logits + compile", "compile"),
    ("x chunked eager", "chunked_linear"),
)


def _linear_sections(run: Run) -> list[str]:
    """Time and memory from hidden states to loss and gradients."""
    timed = list(summary.contests(run, "linear"))
    sizes = list(summary.contests(run, "linear_chunk"))
    memory = [m for m in run.memory if m.workload["hidden"]]
    parts = ["## From hidden states"] if timed or sizes or memory else []
    if timed and summary.on_gpu(run):
        parts.append(_grid(timed, _flops_cell))
    if timed:
        parts += [
            "`fused_linear`: no logits in memory; `x name` is how many times longer the other one "
            "takes. `products + loss`: the bare matrix products and the fused loss, memory "
            "reused, which is the floor; `logits +`: all logits, then that loss. `GFLOP/s` counts "
            "the products only.",
            _linear_table(timed),
        ]
    if sizes:
        parts += [
            "Time over `max_chunk_bytes`, relative to the default (CPU time says more where others "
            "took the cores):",
            _chunk_table(run, sizes),
        ]
    if memory:
        budget = run.options["max_chunk_bytes"] / 2**20
        parts += [
            f"Peak extra memory in MiB, and in brackets what is beyond the gradients in units of "
            f"the budget for tiles of logits ({budget:.0f} MiB):",
            _linear_memory_table(run, memory),
        ]
    return parts


_CLOCKS = [("wall", "wall_ns"), ("CPU", "cpu_ns")]


def _linear_table(timed: Sequence[Contest]) -> str:
    header = ("workload", "tokens", "fused_linear", "GFLOP/s", *(h for h, _ in _LINEAR_RIVALS))
    rows = [
        [
            summary.case(contest.workload),
            str(contest.workload["rows"]),
            _range(summary.spread(summary.samples(contest, "fused_linear"))),
            _number(summary.flop_rate(contest, "fused_linear"), ".0f"),
            *(_times(contest, rival, digits=2) for _, rival in _LINEAR_RIVALS),
            _errors(contest, "fused_linear"),
            _errors(contest, "eager"),
        ]
        for contest in timed
    ]
    return table([*header, "error loss / grad", "eager's"], rows)


def _chunk_table(run: Run, sizes: Sequence[Contest]) -> str:
    names = list(dict.fromkeys(name for c in sizes for name, e in c.entries.items() if e.wall_ns))
    header = ["workload", "clock", *(name.removeprefix("chunk_") for name in names)]
    clocks = [("device", "wall_ns")] if summary.on_gpu(run) else _CLOCKS
    rows = [
        [summary.case(c.workload), title, *(_times(c, name, clock, digits=2) for name in names)]
        for c in sizes
        for title, clock in clocks
    ]
    return table(header, rows)


def _linear_memory_table(run: Run, memory: Sequence[Memory]) -> str:
    providers = list(dict.fromkeys(m.provider for m in memory))
    cells = {(summary.case(m.workload), m.provider): m for m in memory}

    def cell(name: str, provider: str) -> str:
        found = cells.get((name, provider))
        if found is None or found.peak_bytes is None:
            return "-" if found is None else found.status
        chunks = summary.chunks_beyond_gradients(run, found)
        return f"{found.peak_bytes / 2**20:.0f} ({_number(chunks)})"

    names = list(dict.fromkeys(name for name, _ in cells))
    return table(["workload", *providers], [[n, *(cell(n, p) for p in providers)] for n in names])


def _memory_table(memory: Sequence[Memory]) -> str:
    names = list(dict.fromkeys(summary.case(m.workload) for m in memory))
    cells = {(m.provider, summary.case(m.workload)): m for m in memory}
    rows = []
    for provider in dict.fromkeys(m.provider for m in memory):
        found = [cells.get((provider, name)) for name in names]
        if any(m is not None and m.peak_bytes is not None for m in found):
            rows.append([provider, *map(_peak, found)])
    explanation = "In units of one logits tensor; the gradient itself is 1.00."
    return explanation + "\n\n" + table(["provider", *names], rows)


def _absent(contest: Contest) -> str:
    """Who does not take part, and why."""
    reasons: dict[str, list[str]] = {}
    for name, entry in contest.entries.items():
        if entry.status == "skipped":
            reasons.setdefault(entry.reason, []).append(name)
    lines = (f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return f"\n\nNot here: {'; '.join(lines)}." if reasons else ""


def _peak(memory: Memory | None) -> str:
    if memory is None or memory.peak_bytes is None:
        return "-" if memory is None else memory.status
    units = memory.peak_bytes / summary.gradient_bytes(memory)
    return f"{units:.2f} ({memory.peak_bytes / 2**20:.1f} MiB)"


def _target_table(run: Run) -> str:
    rows = []
    for verdict in summary.verdicts(run):
        target, worst = verdict.target, verdict.worst
        sign = ">=" if target.at_least else "<="
        aim = f" (aim {target.aim:g})" if target.aim is not None else ""
        met, total = len(verdict.fulfilled()), len(verdict.cases)
        answer = "not measured" if not total else "met" if met == total else "NOT met"
        rows.append(
            [
                target.name,
                f"{sign} {target.bound:g} {target.unit}{aim}",
                f"{worst[1]:.3g} ({worst[0]})" if worst else "-",
                f"{min(verdict.cases.values()):.3g} to {max(verdict.cases.values()):.3g}"
                if worst
                else "-",
                f"{answer} ({met}/{total})",
            ]
        )
    return table(["target", "bound", "worst case", "range", "verdict"], rows)


def _detail(run: Run, contest: Contest) -> str:
    workload = contest.workload
    floor = summary.floor_per_logit(run, contest)
    used, loads = summary.used_rounds(contest), [r.load for r in contest.rounds] or [0.0]
    digits = 2 if workload["hidden"] else 1  # few of these are many times slower
    on_gpu = summary.on_gpu(run)
    rows = []
    for name, entry in contest.entries.items():
        if entry.status == "skipped":
            continue
        found = summary.spread(summary.samples(contest, name))
        cpu = summary.spread(summary.samples(contest, name, "cpu_ns"))
        rows.append(
            [
                name,
                _range(found) if entry.status == "ok" else f"{entry.status}: {entry.reason}",
                _time(cpu.median / run.options["threads"]) if cpu else "-",
                _number(summary.per_logit(run, contest, name), ".4f" if on_gpu else ".2f"),
                _number(summary.bandwidth_share(run, contest, name), ".0%"),
                _times(contest, name, digits=digits),
                _times(contest, name, "cpu_ns", digits),
                _errors(contest, name),
            ]
        )
    floor_text = f", floor {floor:.{4 if on_gpu else 3}f} ns/logit" if floor else ""
    if workload["hidden"]:
        floor_text = f", hidden size {workload['hidden']}, {workload['flops'] / 1e9:.1f} GFLOP"
    host, bandwidth = ("host", "2R1W") if on_gpu else ("CPU", "copy")
    return (
        f"### {workload['name']}\n\n[{workload['rows']}, {workload['vocab']}] {workload['dtype']}, "
        f"T = {workload['temperature']:g}, {workload['divergence']}, "
        f"{workload['bytes_moved'] / 1e6:.1f} MB to move{floor_text}; {len(used)} of "
        f"{len(contest.rounds)} rounds used, load {min(loads):.1f} to {max(loads):.1f}\n\n"
        + table(
            [
                "provider",
                "device" if on_gpu else "wall",
                host if on_gpu else "CPU / threads",
                "ns/logit",
                f"of {bandwidth} bw",
                f"{'device' if on_gpu else 'wall'} / {summary.subject(contest)}",
                f"{host} / {summary.subject(contest)}",
                "error loss / grad",
            ],
            rows,
        )
        + _absent(contest)
    )


# --- the plot -------------------------------------------------------------------------------------

#: Okabe-Ito, readable with colour blindness.
_COLORS = {
    "eager": "#999999",
    "compile": "#E69F00",
    "chunked": "#CC79A7",
    "fused": "#0072B2",
    "kernel": "#56B4E9",
    "floor": "#D55E00",
}
_LABELS = {
    "eager": "eager PyTorch (fastest)",
    "compile": "torch.compile (best)",
    "chunked": "chunked PyTorch (best)",
    "fused": "fused_kd_loss",
    "kernel": "kernel, gradient buffer reused (CPU time / threads)",
}
_GPU_LABELS = {**_LABELS, "kernel": "kernel, gradient buffer reused"}
_LINEAR_LABELS = {
    "eager": "all logits, eager PyTorch",
    "compile": "all logits, torch.compile",
    "chunked_linear": "chunks of rows, eager PyTorch",
    "fused": "all logits, fused_kd_loss",
    "fused_linear": "fused_linear_kd_loss",
}
_LINEAR_COLORS = {
    "eager": _COLORS["eager"],
    "compile": _COLORS["compile"],
    "chunked_linear": _COLORS["chunked"],
    "fused": _COLORS["kernel"],
    "fused_linear": _COLORS["fused"],
}


def plot(run: Run, path: Path) -> bool:
    """Speed-up over eager, and ns per logit against the bandwidth floor; False: nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = summary.contests(run, "kd_ce", "peer")
    shown = [c for c in compared if summary.fastest(c, "eager")]
    # All temperatures of all shapes would be unreadable: T = 2 of every shape, if there is any.
    shown = [c for c in shown if c.workload["temperature"] == 2] or shown
    other = list(summary.contests(run, "divergence"))
    if not shown:
        return False
    panels = 3 if other else 2
    figure, axes = pyplot.subplots(
        panels, 1, figsize=(max(11.0, 1.15 * len(shown)), 4.2 * panels), layout="constrained"
    )
    _draw_speedups(axes[0], shown)
    _draw_costs(axes[1], run, shown, [_shape_label(c) for c in shown])
    bandwidth = "two reads and a write" if summary.on_gpu(run) else "copy bandwidth"
    axes[1].set_title(f"Cost per logit, and the floor set by the machine's {bandwidth}")
    if other:
        _draw_costs(axes[2], run, other, [c.workload["divergence"] for c in other], eager=True)
        dtype, vocab = other[0].workload["dtype"], other[0].workload["vocab"]
        axes[2].set_title(f"Divergences, {dtype}, V = {vocab}, T = 2 (log scale)")
    _save(figure, run, "alpha T² KL + (1 - alpha) CE, forward + backward", path)
    return True


def _save(figure: Figure, run: Run, what: str, path: Path) -> None:
    """Write the figure, titled with what was measured, where and when."""
    from matplotlib import pyplot

    machine, date = run.machine, run.versions["date"][:10]
    figure.suptitle(
        f"{what}: {machine['cpu']}, {run.options['threads']} threads, {machine['device']}, {date}",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _shape_label(contest: Contest) -> str:
    return f"{contest.workload['dtype']}\nV = {contest.workload['vocab']}"


def _bars(
    axis: Axes,
    series: dict[str, list[float | None]],
    names: Sequence[str],
    base: float = 0.0,
    colors: Mapping[str, str] = _COLORS,
    names_of: Mapping[str, str] = _LABELS,
) -> None:
    """Grouped bars, the value on top of each."""
    width = 0.84 / len(series)
    for index, (key, values) in enumerate(series.items()):
        left = (index - (len(series) - 1) / 2) * width
        at = [i + left for i, value in enumerate(values) if value is not None]
        heights = [value for value in values if value is not None]
        # On a log scale a bar starts at 1, so that slower than the reference points down.
        tops = [value - base for value in heights]
        bars = axis.bar(at, tops, width * 0.94, bottom=base, color=colors[key], label=names_of[key])
        texts = [f"{h:.0f}" if h >= 9.95 else f"{h:.1f}" if h >= 1 else f"{h:.2f}" for h in heights]
        axis.bar_label(bars, texts, fontsize=7, padding=1.5)
    axis.set_xticks(range(len(names)), names, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def _log_axis(axis: Axes, headroom: float) -> None:
    """A log scale labelled with plain numbers, with room above for the legend."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top * headroom)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_speedups(axis: Axes, shown: Sequence[Contest]) -> None:
    series: dict[str, list[float | None]] = {key: [] for key in ("compile", "chunked", "fused")}
    for contest in shown:
        eager = summary.fastest(contest, "eager")
        for key, values in series.items():
            name = key if key == "fused" else summary.fastest(contest, key)
            found = summary.ratio(contest, eager, name) if eager and name else None
            values.append(found.median if found else None)
    _bars(axis, series, [_shape_label(c) for c in shown], base=1.0)
    axis.axhline(1, color=_COLORS["eager"], lw=1.5, label=_LABELS["eager"])
    _log_axis(axis, headroom=1.8)
    axis.set_ylabel("times faster than eager")
    axis.set_title("Speed-up over eager PyTorch in the same dtype (log scale)")
    axis.legend(ncols=4, fontsize=8, frameon=False, loc="upper left")


def _draw_costs(
    axis: Axes, run: Run, shown: Sequence[Contest], names: Sequence[str], eager: bool = False
) -> None:
    series: dict[str, list[float | None]] = {}
    if eager:
        rivals = [summary.fastest(c, "eager") for c in shown]
        series["eager"] = [
            summary.per_logit(run, c, r) if r else None for c, r in zip(shown, rivals, strict=True)
        ]
    series["fused"] = [summary.per_logit(run, c, "fused") for c in shown]
    kernels = [summary.per_logit(run, c, "kernel", summary.kernel_clock(run)) for c in shown]
    if any(k is not None for k in kernels):
        series["kernel"] = kernels
    on_gpu = summary.on_gpu(run)
    _bars(axis, series, names, names_of=_GPU_LABELS if on_gpu else _LABELS)
    for index, contest in enumerate(shown):
        floor = summary.floor_per_logit(run, contest)
        if floor is not None:
            label = f"{'2R1W' if on_gpu else 'copy'}-bandwidth floor" if index == 0 else None
            axis.hlines(floor, index - 0.45, index + 0.45, _COLORS["floor"], lw=1.8, label=label)
    axis.set_ylabel("ns per logit")
    if eager:
        _log_axis(axis, headroom=2.5)
    else:
        axis.set_ylim(top=axis.get_ylim()[1] * 1.15)
    axis.legend(ncols=4, fontsize=8, frameon=False, loc="upper left")


def plot_linear(run: Run, path: Path) -> bool:
    """From hidden states: speed-up over eager, and peak memory over tokens; False: no numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [c for c in summary.contests(run, "linear") if summary.samples(c, "eager")]
    memory = list(_over_tokens(run))
    draws = [draw for draw, data in ((_draw_linear, timed), (_draw_memory, memory)) if data]
    if not draws:
        return False
    figure, axes = pyplot.subplots(
        len(draws), 1, figsize=(11.0, 4.6 * len(draws)), layout="constrained", squeeze=False
    )
    for draw, axis in zip(draws, axes[:, 0], strict=True):
        draw(axis, run)
    _save(figure, run, "Hidden states to loss and gradients", path)
    return True


def _draw_linear(axis: Axes, run: Run) -> None:
    shown = [c for c in summary.contests(run, "linear") if summary.samples(c, "eager")]
    series: dict[str, list[float | None]] = {}
    for name in ("compile", "chunked_linear", "fused", "fused_linear"):
        found = [summary.ratio(c, "eager", name) for c in shown]
        series[name] = [ratio.median if ratio else None for ratio in found]
    ceiling = [summary.ratio(c, "eager", "products") for c in shown]
    labels = [f"{_shape_label(c)}, {c.workload['rows']} tokens" for c in shown]
    _bars(axis, series, labels, base=1.0, colors=_LINEAR_COLORS, names_of=_LINEAR_LABELS)
    for index, ratio in enumerate(ceiling):
        if ratio:
            label = "bare products + fused loss" if index == 0 else None
            left, right = index - 0.45, index + 0.45
            axis.hlines(ratio.median, left, right, _COLORS["floor"], lw=1.8, label=label)
    axis.axhline(1, color=_COLORS["eager"], lw=1.5, label=_LINEAR_LABELS["eager"])
    _log_axis(axis, headroom=2.2)
    axis.set_ylabel("times faster")
    axis.set_title("Speed-up over all logits with eager PyTorch (log scale)")
    axis.legend(ncols=3, fontsize=8, frameon=False, loc="upper left")


def _over_tokens(run: Run) -> Iterator[Memory]:
    """Peaks of the workloads that differ in nothing but their tokens."""
    for memory in run.memory:
        if memory.workload["name"].startswith("linear_memory/") and memory.peak_bytes is not None:
            yield memory


def _draw_memory(axis: Axes, run: Run) -> None:
    from matplotlib.ticker import FuncFormatter

    memory = list(_over_tokens(run))
    for provider in dict.fromkeys(m.provider for m in memory):
        points = [(m.workload["rows"], m.peak_bytes) for m in memory if m.provider == provider]
        tokens, peaks = zip(*sorted(points), strict=True)
        color, label = _LINEAR_COLORS[provider], _LINEAR_LABELS[provider]
        axis.plot(tokens, [p / 2**20 for p in peaks], "o-", color=color, label=label)
    sizes = sorted({(m.workload["rows"], summary.gradient_bytes(m)) for m in memory})
    tokens, gradients = zip(*sizes, strict=True)
    axis.plot(tokens, [g / 2**20 for g in gradients], "k:", label="the gradients alone")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xticks(tokens)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.set_xlabel("tokens")
    axis.set_ylabel("MiB")
    first = memory[0].workload
    axis.set_title(
        f"Peak extra memory, {first['dtype']}, V = {first['vocab']}, hidden size {first['hidden']}"
    )
    axis.legend(ncols=2, fontsize=8, frameon=False, loc="upper left")


def write(run: Run, folder: Path, stem: str) -> tuple[str, list[Path]]:
    """Table and plots next to the JSON: (the table's text, the files written)."""
    text = markdown(run)
    written = [folder / f"{stem}.md"]
    written[0].write_text(text)
    for draw, name in ((plot, f"{stem}.png"), (plot_linear, f"{stem}-linear.png")):
        if draw(run, folder / name):
            written.append(folder / name)
    return text, written
