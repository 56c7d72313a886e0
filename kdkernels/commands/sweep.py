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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import divergences
from ..options import DIVISOR, divides
from ..training.tasks import ENCODER
from ..training.teachers import Student
from . import report
from .distill import evaluate, make_trainer
from .experiment import Experiment

#: Metric -> whether larger is better.
METRICS = {"loss": False, "agreement": True, "accuracy": True}
RESULT_FILES = ("sweep.json", "sweep.md", "sweep.png", "best.yaml")


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
    for name in ("temperature_schedule", "alpha_schedule", "divergence_parameters"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}: cannot be given together with a sweep")
    for name in sweep.sweep_divergences:
        try:
            divergences.resolve(name, args.beta)
        except ValueError as error:
            raise ValueError(f"sweep_divergences: {name!r}: {error}") from error
    student = Student.of(experiment.student, experiment.task, args)
    temperatures = {s["temperature"] for s in sweep.settings(args.seed)}
    experiment.teacher.check(student._replace(temperatures=temperatures))


def run(experiment: Experiment, sweep: SweepArguments) -> dict[str, Any]:
    """Every trial, and their files in the output folder; returns what ``sweep.json`` holds."""
    started = time.perf_counter()
    settings = sweep.settings(experiment.args.seed)
    output = experiment.output
    scratch = output / "trials"
    changes: dict[str, Any] = {"output_dir": str(scratch)}
    changes |= {"save_strategy": "no", "eval_strategy": "no"}
    if sweep.sweep_steps is not None:
        changes |= {"max_steps": sweep.sweep_steps}
    rows = []
    for number, setting in enumerate(settings, start=1):
        student = copy.deepcopy(experiment.student)
        title = f"trial {number} of {len(settings)}"
        trained = make_trainer(experiment, title, student, True, **changes | setting).train()
        row = evaluate(experiment, title, student) | {"steps": trained.global_step}
        # The table's "divergence" is a number: the setting's name goes beside it.
        row |= {"temperature": setting["temperature"], "alpha": setting["alpha"]}
        row["divergence_name"] = setting["divergence"]
        rows.append(row)
        if experiment.args.process_index == 0:
            print(f"{title}: {_words(setting)}: {sweep.sweep_metric} {row[sweep.sweep_metric]:.4f}")
            sys.stdout.flush()
    if scratch.is_dir() and not any(scratch.iterdir()):
        scratch.rmdir()
    best = min(range(len(rows)), key=lambda at: _rank(rows[at], sweep.sweep_metric))
    outcome = {
        "metric": sweep.sweep_metric,
        "trials": rows,
        "best": settings[best],
        "seed": experiment.args.seed,
        "seconds": time.perf_counter() - started,
    }
    if experiment.args.process_index == 0:
        _write(experiment, outcome)
    return outcome


def _rank(row: dict[str, Any], metric: str) -> float:
    """Smaller is better; NaN last."""
    value: float = row[metric]
    if math.isnan(value):
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
        numbers = [f"{row['temperature']:g}", f"{row['alpha']:g}", f"{row['loss']:.4f}"]
        numbers += [f"{row['agreement']:.1%}", f"{row['accuracy']:.1%}"]
        lines.append([row["divergence_name"], *numbers])
    return report.markdown(lines)


def _write(experiment: Experiment, outcome: dict[str, Any]) -> None:
    import yaml

    output = experiment.output
    output.mkdir(parents=True, exist_ok=True)
    (output / "sweep.json").write_text(json.dumps(outcome, indent=1, default=str) + "\n")
    _plot(outcome, output / "sweep.png")
    best = {
        name: value
        for name, value in experiment.configuration.items()
        if not name.startswith("sweep_") and name not in ("output_dir", "overwrite_output_dir")
    }
    comment = (
        f"# Best of {len(outcome['trials'])} trials by {outcome['metric']} (one seed, "
        f"{outcome['seed']}; a short budget): `kdkernels distill best.yaml --output_dir ...`\n"
    )
    text = yaml.safe_dump(json.loads(json.dumps(best | outcome["best"], default=str)))
    (output / "best.yaml").write_text(comment + text, encoding="utf-8")
    note = (
        f"Best: {_words(outcome['best'])}, by {outcome['metric']}. One seed: trials that differ by "
        "a few percent are not told apart.\n\n![Heat map](sweep.png)\n"
    )
    (output / "sweep.md").write_text(f"# Sweep\n\n{table(outcome)}\n\n{note}", encoding="utf-8")


def _plot(outcome: dict[str, Any], path: Path) -> None:
    """One panel for each divergence: the metric over temperature and alpha."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric, rows = outcome["metric"], outcome["trials"]
    names = list(dict.fromkeys(row["divergence_name"] for row in rows))
    values = [row[metric] for row in rows if math.isfinite(row[metric])] or [0.0]
    style = {"vmin": min(values), "vmax": max(values)}
    style |= {"cmap": "viridis" if METRICS[metric] else "viridis_r"}
    figure, grid = pyplot.subplots(
        1, len(names), figsize=(4.6 * len(names) + 1, 4.2), layout="constrained", squeeze=False
    )
    for axes, name in zip(grid[0], names, strict=True):
        mine = [row for row in rows if row["divergence_name"] == name]
        drawn = _panel(axes, mine, metric, style)
        axes.set(title=name, xlabel="temperature", ylabel="alpha")
    figure.colorbar(drawn, ax=list(grid[0]), label=f"held-out {metric}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axes: Any, rows: list[dict[str, Any]], metric: str, style: dict[str, Any]) -> Any:
    """A heat map with numbers where the settings are a whole grid, else coloured dots."""
    temperatures, alphas = (sorted({row[key] for row in rows}) for key in ("temperature", "alpha"))
    if len(temperatures) * len(alphas) != len(rows):
        axes.set_xscale("log")
        places = [[row[key] for row in rows] for key in ("temperature", "alpha", metric)]
        return axes.scatter(places[0], places[1], c=places[2], s=90, **style)
    found = {(row["alpha"], row["temperature"]): row[metric] for row in rows}
    matrix = [[found[a, t] for t in temperatures] for a in alphas]
    axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
    axes.set_yticks(range(len(alphas)), [f"{a:g}" for a in alphas])
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
    for (at, line), (column, _) in itertools.product(enumerate(matrix), enumerate(temperatures)):
        axes.text(column, at, f"{line[column]:.3f}", ha="center", va="center", bbox=box)
    return axes.imshow(matrix, origin="lower", aspect="auto", **style)
