"""What a run leaves behind: the student and its card, ``results.json``, report and pictures."""

from __future__ import annotations

import contextlib
import html
import importlib.metadata
import math
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training import sentences
from ..training.folders import plain, write_json, write_text, written_file, written_whole
from ..training.models import ModelSource
from ..training.redaction import redacted
from ..training.sentences import Sentences
from ..training.tasks import ENCODER
from .experiment import Experiment
from .geometry import pairwise_cosines
from .output import GEOMETRY_FILE, RESULT_FILES, STUDENT_FOLDER

RESULTS, CURVES, REPORT, PAGE = RESULT_FILES

#: Okabe and Ito's palette: told apart by everyone.
COLOURS = {
    "labels only": "#D55E00",
    "output only": "#D55E00",
    "distilled": "#0072B2",
    "teacher": "#555555",
}

#: Title, key in a row, format; a column that no row fills is left out.
_COLUMNS = (
    ("model", "name", "{}"),
    ("parameters", "millions", "{:.1f} M"),
    ("size", "relative_size", "{:.2f}x"),
    ("MB", "megabytes", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:.0f}"),
    ("speed", "relative_speed", "{:.2f}x"),
    ("spread", "speed_spread", "{:.0%}"),
    ("held-out loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("agreement", "agreement", "{:.1%}"),
    ("divergence", "divergence", "{:.4f}"),
    ("Spearman", "spearman", "{:.3f}"),
    ("Pearson", "pearson", "{:.3f}"),
    ("cosine", "cosine", "{:.3f}"),
    ("5-NN", "neighbours", "{:.3f}"),
    ("seed", "seed", "{}"),
    ("steps", "steps", "{}"),
    ("tokens seen", "tokens_seen", "{}"),
    ("training s", "train_seconds", "{:.0f}"),
)
#: Column -> the number that it shows as a share of the teacher's, the first row's.
_RELATIVE = {"relative_size": "parameters", "relative_speed": "tokens_per_second"}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table that is also aligned for a terminal."""
    rows = [row | _relative(row, rows[0]) | _millions(row) for row in rows]
    columns = [c for c in _COLUMNS if any(row.get(c[1]) is not None for row in rows)]
    lines = [[title for title, _, _ in columns]]
    for row in rows:
        values = [(row.get(key), template) for _, key, template in columns]
        lines.append(
            ["-" if value is None else template.format(value) for value, template in values]
        )
    return markdown(lines)


def _millions(row: dict[str, Any]) -> dict[str, float]:
    """The parameters of a model, where they are known: a server does not say how many it has."""
    return {} if row["parameters"] is None else {"millions": row["parameters"] / 1e6}


def _relative(row: dict[str, Any], teacher: dict[str, Any]) -> dict[str, float]:
    return {
        column: row[key] / teacher[key]
        for column, key in _RELATIVE.items()
        if row.get(key) is not None and teacher.get(key) is not None
    }


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table, heading first, with aligned columns; all but the first to the right."""
    # At least 2: the rule under a heading needs a dash beside its colon.
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_table_line(line, widths) for line in [lines[0], rule, *lines[1:]])


def _table_line(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return f"| {' | '.join(aligned)} |"


#: Key of a row -> what its column is.
_LEGEND = {
    "parameters": "size: parameters over the teacher's",
    "megabytes": "MB: 10^6 bytes of weights, as saved",
    "tokens_per_second": "tokens/s: forward alone, medians of rounds in which the models take "
    "turns; speed: over the teacher's; spread: half of the middle half of the rounds, large where "
    "the machine was busy",
    "loss": "held-out loss: cross-entropy in nats per prediction",
    "perplexity": "perplexity = exp(held-out loss)",
    "agreement": "agreement: share of predictions with the teacher's top entry",
    "divergence": "divergence: the distillation term",
    "spearman": "Spearman, Pearson: correlation with the teacher of the cosines of all pairs of "
    "sentences, of their ranks and linear",
    "cosine": "cosine: of a sentence's vectors in student and teacher",
    "neighbours": "5-NN: share of a sentence's 5 nearest neighbours that both have",
    "tokens_seen": "tokens seen: in training, padding not counted",
}


def legend(rows: list[dict[str, Any]]) -> str:
    """What the table's columns are."""
    told = [text for key, text in _LEGEND.items() if any(key in row for row in rows)]
    return "; ".join(told) + "."


def results(
    experiment: Experiment,
    rows: list[dict[str, Any]],
    curves: dict[str, list[dict[str, Any]]],
    problems: list[str],
    seconds: float,
) -> dict[str, Any]:
    """The content of ``results.json``; ``problems``: what went wrong, in lines."""
    names = ("kdkernels", "torch", "transformers", "accelerate", "datasets")
    corpus = experiment.corpus
    return {
        "rows": rows,
        "problems": problems,
        "seconds": seconds,
        "teacher": experiment.teacher_name,
        "configuration": experiment.configuration,
        "data": {
            "train_tokens": corpus.train.tokens,
            "validation_tokens": corpus.validation.tokens,
            "sequence_length": corpus.train.sequence_length,
        },
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "device": str(experiment.args.device),
            "processes": experiment.args.world_size,
            "threads": torch.get_num_threads(),
            "versions": {name: _version(name) for name in names},
        },
        "curves": curves,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextlib.contextmanager
def told(problems: list[str], what: str) -> Iterator[None]:
    """Whatever is raised here becomes a line of ``problems`` that begins with ``what``."""
    try:
        yield
    except Exception as error:
        reason = redacted(" ".join(str(error).split()))
        problems.append(f"{what} ({type(error).__name__}: {reason})")


def save_student(experiment: Experiment, folder: Path) -> None:
    """The student and its tokenizer, in the place of an earlier one once they are whole."""
    experiment.student.config.use_cache = True  # the trainer switches it off for training
    with written_whole(folder) as new:
        experiment.student.save_pretrained(new)
        experiment.tokenizer.save_pretrained(new)
        if experiment.task is ENCODER:
            teacher = ModelSource("teacher", experiment.teacher_name)
            sentences.write(new, Sentences.of(experiment.args), experiment.student, teacher)


def write_results(output: Path, outcome: dict[str, Any]) -> None:
    """``results.json``."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULTS, outcome)


def write(
    experiment: Experiment, outcome: dict[str, Any], output: Path, with_card: bool = True
) -> list[str]:
    """Everything about the student that lies in ``output``; returns what cannot be written.

    ``results.json`` first; then report, model card and pictures, each whether or not the others can
    be made.

    Args:
        with_card: whether the student in ``output`` is this run's.
    """
    seed, problems = experiment.args.seed, list[str]()
    folder = output / STUDENT_FOLDER
    with told(problems, f"{RESULTS}: not written"):
        write_results(output, outcome)
    with told(problems, f"{REPORT}: not written"):
        write_text(output / REPORT, redacted(report(outcome, seed)))
    with told(problems, f"{PAGE}: not written"):
        write_text(output / PAGE, redacted(_html(outcome, seed)))
    with told(problems, f"{CURVES}: not drawn"):
        plot(outcome, output / CURVES)
    (output / GEOMETRY_FILE).unlink(missing_ok=True)  # of an earlier run
    if experiment.vectors:
        with told(problems, f"{GEOMETRY_FILE}: not drawn"):
            plot_geometry(experiment.vectors, outcome["rows"], output / GEOMETRY_FILE)
    if with_card:
        with told(problems, "model card: not written"):
            write_text(folder / "README.md", redacted(model_card(experiment, outcome)))
            shutil.copy(output / CURVES, folder / CURVES)
    return problems


# ---- report -------------------------------------------------------------------------------------

_REPORT = """# {title}

{table}

{legend}

{ratios}

One seed ({seed}), {validation_tokens} held-out tokens: differences of a few percent are not
significant. {budget} {seconds:.0f} s in all.

{pictures}

## Configuration

```yaml
{configuration}```

## Data

{data}

## Machine

```yaml
{machine}```
"""

#: Key of a row -> how the last row's ratio to the first is told.
_RATIOS = {
    "parameters": "{:.2f} times the parameters",
    "megabytes": "{:.2f} times the bytes",
    "tokens_per_second": "{:.2f} times the tokens a second",
}


def pictures(outcome: dict[str, Any]) -> dict[str, str]:
    """File -> title of the pictures of a run; only an encoder's has the second one."""
    found = {CURVES: "Curves"}
    if "spearman" in outcome["rows"][-1]:
        found[GEOMETRY_FILE] = "Cosines of pairs of held-out sentences, student over teacher"
    return found


def ratios(rows: list[dict[str, Any]]) -> str:
    """The last row against the first, the teacher, in one sentence of measured numbers, if any."""
    first, last = rows[0], rows[-1]
    both = {key: t for key, t in _RATIOS.items() if first.get(key) and last.get(key) is not None}
    found = [template.format(last[key] / first[key]) for key, template in both.items()]
    if first.get("loss") and last.get("loss"):
        found.append(f"a held-out loss of {last['loss']:.4f} against {first['loss']:.4f}")
    against = f"{last['name'].capitalize()}, against the teacher"
    return f"{against}: {', '.join(found)}." if found else f"{against}: nothing is measured of it."


def budget(rows: list[dict[str, Any]]) -> str:
    """What the trained students were given, in one sentence: the same, or each its own."""
    trained = [row for row in rows if "steps" in row]
    spent = [f"{row['steps']} steps, {row['tokens_seen']} tokens" for row in trained]
    if len(trained) > 1 and len(set(spent)) == 1:
        return f"Equal budgets: the same first weights, the same batches, {spent[0]} each."
    told = (f"{row['name']}: {each}" for row, each in zip(trained, spent, strict=True))
    return f"Budget of {'; '.join(told)}."


def _report_fields(outcome: dict[str, Any], seed: int) -> dict[str, Any]:
    import yaml

    settings = plain(outcome["configuration"])
    return {
        "title": f"Student of {outcome['teacher']}",
        "table": table(outcome["rows"]),
        "legend": legend(outcome["rows"]),
        "ratios": ratios(outcome["rows"]),
        "budget": budget(outcome["rows"]),
        "pictures": "\n\n".join(f"![{what}]({file})" for file, what in pictures(outcome).items()),
        "seed": seed,
        "seconds": outcome["seconds"],
        "validation_tokens": outcome["data"]["validation_tokens"],
        "configuration": yaml.safe_dump(settings, sort_keys=True),
        "data": ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in outcome["data"].items()),
        "machine": yaml.safe_dump(plain(outcome["machine"])),
    }


def report(outcome: dict[str, Any], seed: int) -> str:
    """``report.md``: table, curves, configuration, data and machine of a run."""
    return _REPORT.format(**_report_fields(outcome, seed))


def _html(outcome: dict[str, Any], seed: int) -> str:
    """The same as one page of HTML: blocks of the Markdown become paragraphs, tables and code."""
    style = "body{font:16px sans-serif;max-width:70em;margin:2em auto}td,th{padding:.2em .8em}"
    style += "td+td,th+th{text-align:right}img{max-width:100%}pre{background:#eee;padding:1em}"
    blocks = []
    for position, part in enumerate(report(outcome, seed).split("```")):
        if position % 2:
            blocks.append(f"<pre>{html.escape(part.removeprefix('yaml').strip())}</pre>")
            continue
        blocks += [_html_block(block) for block in part.strip().split("\n\n") if block]
    body = "\n".join(blocks)
    head = f'<meta charset="utf-8"><title>kdkernels</title><style>{style}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{body}\n</body></html>\n"


def _html_block(block: str) -> str:
    if block.startswith("#"):
        level = len(block) - len(block.lstrip("#"))
        return f"<h{level}>{html.escape(block.lstrip('# '))}</h{level}>"
    if block.startswith("!["):
        title, _, file = block.removeprefix("![").rstrip(")").partition("](")
        return f'<img src="{html.escape(file)}" alt="{html.escape(title)}">'
    if not block.startswith("|"):
        return f"<p>{html.escape(block)}</p>"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")]
    rows = []
    for line in (lines[0], *lines[2:]):
        tag = "th" if line is lines[0] else "td"
        rows.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


# ---- model card ---------------------------------------------------------------------------------

_CARD = """# Student of {teacher}

Distilled with kdkernels: {parameters:.1f} M parameters, taught by {teacher}
({teacher_parameters}).

{table}

{legend}
Measured on {validation_tokens} held-out tokens in windows of at most {sequence_length}, one seed
({seed}): differences of a few percent are not significant. Held out from this training; the teacher
may have seen the text in its own.

![Loss curves](loss.png)

## Use

```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
model = {auto_class}.from_pretrained("path/of/this/folder")
```

## Data

{data}

## Licence

{licence_text}

## Configuration

```yaml
{configuration}```
"""


#: Task -> how the Hugging Face hub calls it.
_PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "encoder": "feature-extraction",
}


def teacher_licence(experiment: Experiment) -> str | None:
    """The licence that the teacher's own card or GGUF header states; None if it states none."""
    source = experiment.model_args.teacher
    if source is None:
        return None
    try:
        if source.lower().endswith(".gguf"):
            from gguf import GGUFReader

            licence = GGUFReader(source).get_field("general.license")
            return None if licence is None else str(licence.contents())
        from huggingface_hub import ModelCard

        card = Path(source).expanduser() / "README.md"
        return ModelCard.load(card if Path(source).expanduser().exists() else source).data.license
    except Exception:  # no card, no network, no front matter: then nothing is stated
        return None


def _size_of(teacher: dict[str, Any]) -> str:
    known = teacher["parameters"]
    return "as it was served" if known is None else f"{known / 1e6:.1f} M"


def model_card(experiment: Experiment, outcome: dict[str, Any]) -> str:
    """The student's README.md."""
    import yaml
    from huggingface_hub import ModelCardData

    licence = teacher_licence(experiment)
    stated = licence or "not stated with the teacher; ask its owner"
    rows, data = outcome["rows"], outcome["data"]
    notice = experiment.data_args.data_notice or experiment.data_args.train_text
    header = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag=_PIPELINES.get(experiment.task.name),
        tags=["knowledge-distillation", "kdkernels"],
    )
    body = _CARD.format(
        teacher=experiment.teacher_name,
        parameters=rows[-1]["parameters"] / 1e6,
        teacher_parameters=_size_of(rows[0]),
        table=table(rows),
        legend=legend(rows),
        auto_class=experiment.task.auto_class.__name__,
        seed=experiment.args.seed,
        data=f"{notice}\n\n{data['train_tokens']} training tokens were available.",
        licence_text=f"The teacher's licence: {stated}. A student made from a teacher's layers or "
        "outputs is bound by it.",
        configuration=yaml.safe_dump(plain(outcome["configuration"]), sort_keys=True),
        **data,
    )
    return f"---\n{header.to_yaml()}\n---\n\n{body}"


# ---- plot ---------------------------------------------------------------------------------------


def _series(log: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values; a resumed run's checkpoint has None where a value was not finite."""
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    values = [math.nan if value is None else value for _, value in points]
    return [step for step, _ in points], values


def _last_step(log: list[dict[str, Any]]) -> int:
    return max((entry["step"] for entry in log), default=0)


def save_figure(figure: Any, path: Path) -> None:
    """The picture as a file, in the place of an earlier one once it is drawn."""
    from matplotlib import pyplot

    try:
        with written_file(path) as new:
            figure.savefig(new, dpi=150, format="png")
    finally:
        pyplot.close(figure)


def _smooth(values: list[float], window: int) -> list[float]:
    """Running mean over the last ``window`` values."""
    starts = (max(0, end - window) for end in range(1, len(values) + 1))
    return [sum(values[start:end]) / (end - start) for end, start in enumerate(starts, start=1)]


def _held_out(outcome: dict[str, Any], arm: str, key: str, row_key: str) -> tuple[list, list]:
    """Held-out values of one arm: before training, during, and after."""
    by_name = {row["name"]: row for row in outcome["rows"]}
    log = outcome["curves"][arm]
    steps, values = _series(log, f"eval_{key}")
    last = _last_step(log)
    if not steps or steps[-1] != last:
        after = by_name[f"student, {arm}"].get(row_key, math.nan)
        steps, values = [*steps, last], [*values, after]
    return [0, *steps], [by_name["student, untrained"][row_key], *values]


def plot(outcome: dict[str, Any], path: Path) -> None:
    """The curves of every arm: on the labels, against the teacher, and every other term."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = outcome["rows"][-1]
    panels = [_plot_labels] if "loss" in measured else []
    panels += [_plot_distance] if "divergence" in measured else []
    panels += [_plot_terms] if _term_names(outcome) else []
    panels = panels or [_plot_nothing]
    size = (5.5 * len(panels), 4.4)
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        panel(axes, outcome)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    save_figure(figure, path)


def _plot_nothing(axes: Any, outcome: dict[str, Any]) -> None:
    """An encoder that was trained for fewer steps than `logging_steps` has no curve."""
    last = max(map(_last_step, outcome["curves"].values()), default=0)
    axes.set(title=f"No loss was logged in {last} steps", yticks=[])


def _plot_labels(axes: Any, outcome: dict[str, Any]) -> None:
    for arm in outcome["curves"]:
        _draw(axes, outcome, arm, "ce_loss", "loss")
    teacher = outcome["rows"][0].get("loss")  # a cached one has none
    if teacher is not None:
        style = {"color": COLOURS["teacher"], "linestyle": ":"}
        axes.axhline(teacher, label=f"teacher ({teacher:.2f})", **style)
    axes.set(title="Loss on the labels", ylabel="cross-entropy, nats")


def _plot_distance(axes: Any, outcome: dict[str, Any]) -> None:
    for arm, log in outcome["curves"].items():
        if any("kd_loss" in entry for entry in log):
            _draw(axes, outcome, arm, "kd_loss", "divergence")
            continue
        untrained, trained = (
            next(row.get("divergence", math.nan) for row in outcome["rows"] if row["name"] == name)
            for name in ("student, untrained", f"student, {arm}")
        )
        last = _last_step(log)
        style = {"color": COLOURS[arm], "marker": "o", "markersize": 5, "linestyle": "--"}
        axes.plot([0, last], [untrained, trained], label=f"{arm}, held out", **style)
    axes.set(title="Distance from the teacher", ylabel="distillation term, nats")


def plot_geometry(vectors: dict[str, Tensor], rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each student: its cosine over the teacher's, for all pairs of examples.

    Args:
        vectors: title of a row -> sentence vectors [N, D]; the teacher's first.
    """
    import matplotlib
    import numpy

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    cosines = {name: pairwise_cosines(found).numpy() for name, found in vectors.items()}
    teacher = cosines.pop("teacher")
    finite = [c[numpy.isfinite(c)] for c in (teacher, *cosines.values())]  # one may have diverged
    edges = numpy.linspace(min(c.min(initial=0.0) for c in finite), 1, 81)
    counts = {
        name: numpy.histogram2d(teacher, values, bins=(edges, edges))[0].T
        for name, values in cosines.items()
    }
    scale = LogNorm(1, max(2, *(found.max() for found in counts.values())))
    size = (4.2 * len(counts) + 0.8, 4.6)
    figure, grid = pyplot.subplots(
        1, len(counts), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    spearman = {row["name"]: row["spearman"] for row in rows if "spearman" in row}
    for axes, (name, found) in zip(grid[0], counts.items(), strict=True):
        seen = numpy.ma.masked_equal(found, 0)
        drawn = axes.pcolormesh(edges, edges, seen, norm=scale, cmap="viridis")
        axes.plot(edges[[0, -1]], edges[[0, -1]], color=COLOURS["teacher"], linestyle=":")
        found_spearman = spearman.get(name, math.nan)
        axes.set(title=f"{name}\nSpearman {found_spearman:.3f}", xlabel="teacher's cosine")
        axes.set_box_aspect(1)
    grid[0][0].set_ylabel("student's cosine")
    figure.colorbar(drawn, ax=list(grid[0]), label="pairs of held-out sentences")
    save_figure(figure, path)


def _term_names(outcome: dict[str, Any]) -> list[str]:
    """Terms beside the response that some arm was trained on."""
    keys = {key for log in outcome["curves"].values() for entry in log for key in entry}
    return sorted(
        key.removesuffix("_loss")
        for key in keys - {"kd_loss", "ce_loss"}
        if key.endswith("_loss") and not key.startswith(("eval_", "train_"))
    )


def _plot_terms(axes: Any, outcome: dict[str, Any]) -> None:
    """Every term of every arm as a share of its first value: their units differ."""
    styles = dict(zip(outcome["curves"], ("-", "--", ":"), strict=False))
    for arm, log in outcome["curves"].items():
        for at, name in enumerate(_term_names(outcome)):
            steps, values = _series(log, f"{name}_loss")
            if values:
                smooth = _smooth(values, max(1, len(values) // 12))
                shares = [value / (smooth[0] or 1.0) for value in smooth]
                label = f"{name} (from {smooth[0]:.3g}), {arm}"
                axes.plot(steps, shares, color=f"C{at}", linestyle=styles[arm], label=label)
    axes.set(title="Other terms", ylabel="share of the first value", ylim=(0, None))


def _draw(axes: Any, outcome: dict[str, Any], arm: str, key: str, row_key: str) -> None:
    """Training values (faint, and their running mean) and held-out values (dots) of one arm."""
    colour = COLOURS[arm]
    steps, values = _series(outcome["curves"][arm], key)
    axes.plot(steps, values, color=colour, alpha=0.18, linewidth=1)
    window = max(1, len(values) // 12)
    axes.plot(steps, _smooth(values, window), color=colour, linewidth=1.8, label=f"{arm}, training")
    steps, values = _held_out(outcome, arm, key, row_key)
    style = {"marker": "o", "markersize": 5, "linestyle": "--", "linewidth": 1}
    axes.plot(steps, values, color=colour, label=f"{arm}, held out", **style)
