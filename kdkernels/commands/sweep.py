"""``kdkernels sweep``: which temperature, alpha and divergence are best on a short budget.

Every trial trains a copy of one untrained student, with one seed and one budget, and is measured on
the held-out text by numbers that do not depend on what is varied: the cross-entropy, the agreement
with the teacher, the accuracy. (The distillation term itself cannot choose: its scale changes with
temperature and divergence.)
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import divergences
from ..options import DIVISOR, divides
from ..training.folders import check_can_be_made, content, plain, write_json, write_text
from ..training.tasks import ENCODER
from ..training.teachers import Student
from . import report
from .distill import evaluate, make_trainer
from .experiment import Experiment
from .output import check_inputs, check_replaced, check_resume, holds_keys
from .rehearsal import check_training, on_first_process

#: Metric -> whether larger is better.
METRICS = {"loss": False, "agreement": True, "accuracy": True}
SWEEP_FILE = "sweep.json"
RESULT_FILES = (SWEEP_FILE, "sweep.md", "sweep.png", "best.yaml")


@dataclass
class SweepArguments:
    """What is varied."""

    _argument_group_name = "sweep"

    sweep_temperatures: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 4.0, 8.0],
        metadata={"help": "Temperatures; with --sweep_trials the ends of a range."},
    )
    sweep_alphas: list[float] = field(
        default_factory=lambda: [0.5, 0.7, 0.9],
        metadata={"help": "Weights of the distillation term; with --sweep_trials a range."},
    )
    sweep_divergences: list[str] = field(
        default_factory=lambda: ["forward_kl"], metadata={"help": "Divergences by name."}
    )
    sweep_trials: int | None = field(
        default=None,
        metadata={
            "help": "Draw this many settings (temperature log-uniform, alpha uniform; seeded by "
            "--seed) instead of the whole grid."
        },
    )
    sweep_steps: int | None = field(
        default=None, metadata={"help": "Updates of a trial; default: the run's own."}
    )
    sweep_metric: str = field(
        default="loss", metadata={"help": "What chooses the best: " + ", ".join(METRICS) + "."}
    )

    def __post_init__(self) -> None:
        self._each("sweep_temperatures", divides, DIVISOR)
        self._each("sweep_alphas", lambda a: 0 < a <= 1, "in (0, 1]")
        known = divergences.names()
        self._each("sweep_divergences", lambda d: d in known, f"one of {', '.join(known)}")
        for name in ("sweep_trials", "sweep_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not at least 1")
        if self.sweep_metric not in METRICS:
            raise ValueError(
                f"sweep_metric: {self.sweep_metric!r} is not one of {', '.join(METRICS)}"
            )

    def _each(self, name: str, allowed: Any, words: str) -> None:
        values = getattr(self, name)
        bad = [value for value in values if not allowed(value)]
        if bad or not values:
            raise ValueError(f"{name}: {bad[0] if bad else values!r} is not {words}")
        if len(set(values)) != len(values):
            raise ValueError(f"{name}: {values!r} holds a value twice")

    def settings(self, seed: int) -> list[dict[str, Any]]:
        """The settings of every trial, in order."""
        if self.sweep_trials is None:
            grid = itertools.product(
                self.sweep_divergences, self.sweep_temperatures, self.sweep_alphas
            )
            return [{"temperature": t, "alpha": a, "divergence": d} for d, t, a in grid]
        draw = random.Random(seed)
        low, high = (math.log(f(self.sweep_temperatures)) for f in (min, max))
        return [
            {
                "temperature": round(math.exp(draw.uniform(low, high)), 4),
                "alpha": round(draw.uniform(min(self.sweep_alphas), max(self.sweep_alphas)), 4),
                "divergence": draw.choice(self.sweep_divergences),
            }
            for _ in range(self.sweep_trials)
        ]


def check(experiment: Experiment, sweep: SweepArguments) -> None:
    """ValueError if the sweep cannot be run with this experiment; before any training."""
    args = experiment.args
    if experiment.task is ENCODER:
        raise ValueError("sweep: an encoder without a head has no response whose settings to vary")
    if experiment.lacks_labels:
        raise ValueError("sweep: without labels there is no alpha to vary; train_text has none")
    for name in ("temperature_schedule", "alpha_schedule", "divergence_parameters"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}: cannot be given together with a sweep")
    keys = set()
    for name in sweep.sweep_divergences:
        try:
            keys.add(divergences.resolve(name, args.beta).key)
        except ValueError as error:
            raise ValueError(f"sweep_divergences: {name!r}: {error}") from error
    student = Student.of(experiment.student, experiment.task, args)
    temperatures = {s["temperature"] for s in sweep.settings(args.seed)}
    experiment.teacher.check(student._replace(temperatures=temperatures, divergences=keys))


def check_folder(
    output: Path, overwrite: bool, resume: str | None, options: dict[str, Any]
) -> None:
    """ValueError unless a sweep may write into ``output``: a new one, or the rest of an old one.

    Arguments as for :func:`kdkernels.commands.output.check_output`.
    """
    check_can_be_made("output_dir", output)
    check_resume(overwrite, resume)
    earlier = _earlier(output)
    if resume is not None and earlier is None:
        raise ValueError(f"resume_from_checkpoint: no {SWEEP_FILE} in {str(output)!r}")
    if resume is None and content(output) and (overwrite or _is_finished(earlier)):
        linked = any((output / name).is_symlink() for name in RESULT_FILES)
        check_replaced(output, overwrite, earlier is not None and not linked)
    check_inputs(output, RESULT_FILES, options)


def _earlier(output: Path) -> dict[str, Any] | None:
    """What the file of an earlier sweep in ``output`` holds; None: there is none."""
    path = output / SWEEP_FILE
    if not holds_keys(path, {"metric", "trials", "configuration"}):
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _is_finished(earlier: dict[str, Any] | None) -> bool:
    """Whether nothing is left to do for the same command; a folder without a sweep counts so."""
    return earlier is None or earlier.get("best") is not None


def _same(configuration: dict[str, Any]) -> dict[str, Any]:
    """The options that a trial depends on, beside its own setting."""
    varied = {field.name for field in fields(SweepArguments)} - {"sweep_steps"}
    others = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm"}
    return {name: v for name, v in configuration.items() if name not in varied | others}


def trials_before(experiment: Experiment) -> list[dict[str, Any]]:
    """The trials of an interrupted sweep in the output folder, those that failed left out.

    ValueError if they were made with other options.
    """
    earlier = _earlier(experiment.output)
    if experiment.run_args.overwrite_output_dir or earlier is None:
        return []
    then, now = _same(earlier["configuration"]), _same(experiment.configuration)
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"output_dir: the sweep in {str(experiment.output)!r} was made with another "
            f"{', '.join(changed)}; choose another folder or --overwrite_output_dir"
        )
    return [row for row in earlier["trials"] if "error" not in row]


def rehearse(experiment: Experiment, sweep: SweepArguments) -> None:
    """ValueError (one line) if the trials, or the files of the sweep, cannot be made."""

    def rehearsal(experiment: Experiment, scratch: Path) -> None:
        settings = sweep.settings(experiment.args.seed)
        changes = _changes(sweep, scratch) | settings[0]
        check_training(make_trainer(experiment, "trial", experiment.student, True, **changes))
        measured = dict.fromkeys(METRICS, 1.0)
        rows = [_row(setting) | measured for setting in settings]
        problems = _write(experiment, _outcome(experiment, sweep, rows, settings, 1.0), scratch)
        if problems:
            raise ValueError(problems[0])

    on_first_process(experiment, rehearsal)


def run(experiment: Experiment, sweep: SweepArguments) -> dict[str, Any]:
    """Every trial, and their files in the output folder; returns what ``sweep.json`` holds.

    A trial is written as soon as it is done. One that fails is written with its error, and the
    others go on.
    """
    started = time.perf_counter()
    settings = sweep.settings(experiment.args.seed)
    done = {_key(row): row for row in trials_before(experiment)}
    rows: list[dict[str, Any]] = []
    scratch = experiment.output / "trials"
    main_process = experiment.args.process_index == 0
    for number, setting in enumerate(settings, start=1):
        title = f"trial {number} of {len(settings)}"
        if main_process:
            _keep(experiment, _outcome(experiment, sweep, rows, [], time.perf_counter() - started))
        row = done.get(_key(_row(setting)))
        told = " (of the earlier sweep)" if row is not None else ""
        if row is None:
            row = _trial(experiment, title, setting, _changes(sweep, scratch))
        rows.append(row)
        if main_process:
            found = (
                row.get("error") or f"{sweep.sweep_metric} {_value(row, sweep.sweep_metric):.4f}"
            )
            print(f"{title}: {_words(setting)}: {found}{told}")
            sys.stdout.flush()
    if scratch.is_dir() and not any(scratch.iterdir()):
        scratch.rmdir()
    outcome = _outcome(experiment, sweep, rows, settings, time.perf_counter() - started)
    if main_process:
        _keep(experiment, outcome)
        outcome["problems"] += _write(experiment, outcome, experiment.output)
    return outcome


def _changes(sweep: SweepArguments, scratch: Path) -> dict[str, Any]:
    """The changes of the run's arguments that are common to all trials."""
    changes: dict[str, Any] = {"output_dir": str(scratch)}
    changes |= {"save_strategy": "no", "eval_strategy": "no"}
    return changes if sweep.sweep_steps is None else changes | {"max_steps": sweep.sweep_steps}


def _row(setting: dict[str, Any]) -> dict[str, Any]:
    """A trial's setting as a part of its row, whose "divergence" is a number."""
    return {
        "temperature": setting["temperature"],
        "alpha": setting["alpha"],
        "divergence_name": setting["divergence"],
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["temperature"], row["alpha"], row["divergence_name"]


def _trial(
    experiment: Experiment, title: str, setting: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    """Train a copy of the student; its row, or one with the ``error`` that stopped it."""
    student = copy.deepcopy(experiment.student)
    problems: list[str] = []
    with report.told(problems, title):
        trained = make_trainer(experiment, title, student, True, **changes | setting).train()
        row = evaluate(experiment, title, student) | {"steps": trained.global_step}
        return row | _row(setting)
    return {"name": title, "error": problems[0]} | _row(setting)


def _outcome(
    experiment: Experiment,
    sweep: SweepArguments,
    rows: list[dict[str, Any]],
    settings: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The content of ``sweep.json``; an unfinished one, without ``settings``, has no best."""
    metric, best = sweep.sweep_metric, None
    problems = [row["error"] for row in rows if "error" in row]
    if settings:
        ranks = [_rank(row, metric) for row in rows]
        at = min(range(len(rows)), key=ranks.__getitem__)
        best = settings[at] if math.isfinite(ranks[at]) else None
        problems += [] if best is not None else [f"no trial has a finite {metric}"]
    return {
        "metric": metric,
        "trials": rows,
        "best": best,
        "seed": experiment.args.seed,
        "seconds": seconds,
        "configuration": experiment.configuration,
        "problems": problems,
    }


def _value(row: dict[str, Any], metric: str) -> float:
    """The metric of a trial; NaN if it failed, or was NaN and is read from JSON."""
    value = row.get(metric)
    return math.nan if value is None else float(value)


def _rank(row: dict[str, Any], metric: str) -> float:
    """Smaller is better; what is not finite last."""
    value = _value(row, metric)
    if not math.isfinite(value):
        return math.inf
    return -value if METRICS[metric] else value


def _words(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def table(outcome: dict[str, Any]) -> str:
    """All trials as a Markdown table, the best first."""
    metric = outcome["metric"]
    ordered = sorted(outcome["trials"], key=lambda row: _rank(row, metric))
    lines = [["divergence", "T", "alpha", "held-out loss", "agreement", "accuracy"]]
    for row in ordered:
        numbers = [f"{row['temperature']:g}", f"{row['alpha']:g}", f"{_value(row, 'loss'):.4f}"]
        numbers += [f"{_value(row, name):.1%}" for name in ("agreement", "accuracy")]
        lines.append([row["divergence_name"], *numbers])
    return report.markdown(lines)


def _keep(experiment: Experiment, outcome: dict[str, Any]) -> None:
    """``sweep.json`` as far as the sweep has come."""
    experiment.output.mkdir(parents=True, exist_ok=True)
    write_json(experiment.output / SWEEP_FILE, outcome)


def _write(experiment: Experiment, outcome: dict[str, Any], output: Path) -> list[str]:
    """The files beside ``sweep.json``; returns what cannot be written."""
    import yaml

    problems: list[str] = []
    best, told = outcome["best"], "No trial has a finite result"
    if best is not None:
        told = f"Best: {_words(best)}, by {outcome['metric']}"
        names = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
        options = {
            name: value
            for name, value in experiment.configuration.items()
            if not name.startswith("sweep_") and name not in names
        }
        comment = (
            f"# Best of {len(outcome['trials'])} trials by {outcome['metric']} (one seed, "
            f"{outcome['seed']}; a short budget): `kdkernels distill best.yaml --output_dir ...`\n"
        )
        with report.told(problems, "best.yaml: not written"):
            write_text(output / "best.yaml", comment + yaml.safe_dump(plain(options | best)))
    note = (
        f"{told}. One seed: trials that differ by a few percent are not told apart.\n\n"
        "![Heat map](sweep.png)\n"
    )
    with report.told(problems, "sweep.md: not written"):
        write_text(output / "sweep.md", f"# Sweep\n\n{table(outcome)}\n\n{note}")
    with report.told(problems, "sweep.png: not drawn"):
        _plot(outcome, output / "sweep.png")
    return problems


def _plot(outcome: dict[str, Any], path: Path) -> None:
    """One panel for each divergence: the metric over temperature and alpha."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric, rows = outcome["metric"], outcome["trials"]
    names = list(dict.fromkeys(row["divergence_name"] for row in rows))
    found = [_value(row, metric) for row in rows]
    values = [value for value in found if math.isfinite(value)] or [0.0]
    style: dict[str, Any] = {"vmin": min(values), "vmax": max(values)}
    style |= {"cmap": "viridis" if METRICS[metric] else "viridis_r"}
    figure, grid = pyplot.subplots(
        1, len(names), figsize=(4.6 * len(names) + 1, 4.2), layout="constrained", squeeze=False
    )
    for axes, name in zip(grid[0], names, strict=True):
        mine = [row for row in rows if row["divergence_name"] == name]
        drawn = _panel(axes, mine, metric, style)
        axes.set(title=name, xlabel="temperature", ylabel="alpha")
    figure.colorbar(drawn, ax=list(grid[0]), label=f"held-out {metric}")
    report.save_figure(figure, path)


def _panel(axes: Any, rows: list[dict[str, Any]], metric: str, style: dict[str, Any]) -> Any:
    """A heat map with numbers where the settings are a whole grid, else coloured dots."""
    temperatures, alphas = (sorted({row[key] for row in rows}) for key in ("temperature", "alpha"))
    if len(temperatures) * len(alphas) != len(rows):
        axes.set_xscale("log")
        places = [[_value(row, key) for row in rows] for key in ("temperature", "alpha", metric)]
        return axes.scatter(places[0], places[1], c=places[2], s=90, **style)
    found = {(row["alpha"], row["temperature"]): _value(row, metric) for row in rows}
    matrix = [[found[a, t] for t in temperatures] for a in alphas]
    axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
    axes.set_yticks(range(len(alphas)), [f"{a:g}" for a in alphas])
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
    for (at, line), (column, _) in itertools.product(enumerate(matrix), enumerate(temperatures)):
        axes.text(column, at, f"{line[column]:.3f}", ha="center", va="center", bbox=box)
    return axes.imshow(matrix, origin="lower", aspect="auto", **style)
