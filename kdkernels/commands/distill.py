"""``kdkernels distill``: a checked experiment, run to a table, a plot and a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..losses.relations import pooled
from ..training import models
from ..training.batches import batches
from ..training.saving import not_finite
from ..training.tasks import ENCODER
from ..training.teachers import NoTeacher
from ..training.trainer import DistillationTrainer
from . import geometry, report
from .data import TokenBlocks
from .experiment import Experiment
from .output import ARM_FOLDERS, RESULTS, STUDENT_FOLDER, remove_checkpoints
from .speed import forward_speeds

#: Changes of the arguments that leave the labels as the only source of learning.
LABELS_ONLY: dict[str, Any] = {
    "alpha": 0.0,
    "alpha_schedule": None,
    "terms": None,
    "balance": "fixed",
}

#: Column of the table -> what an evaluation calls it; text without labels has some of them only.
MEASURED = {
    "loss": "eval_ce_loss",
    "divergence": "eval_kd_loss",
    "agreement": "eval_agreement",
    "accuracy": "eval_accuracy",
    "perplexity": "eval_perplexity",
}

#: An encoder has no labels: its baseline learns nothing but the teacher's sentence vectors.
OUTPUT_ONLY: dict[str, Any] = {"terms": {"sentence": 1.0}, "balance": "fixed"}


class Progress(ProgressCallback):
    """A progress bar that shows the newest losses beside itself, not as lines of dictionaries."""

    SHOWN = ("loss", "kd_loss", "ce_loss", "eval_ce_loss")

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description(f"{self.title}: evaluation")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            self.shown |= {k: f"{logs[k]:.3f}" for k in self.SHOWN if k in logs}
            self.training_bar.set_postfix(self.shown)


def make_trainer(
    experiment: Experiment,
    title: str,
    model: PreTrainedModel,
    taught: bool,
    **changes: Any,
) -> DistillationTrainer:
    """A trainer of ``model`` with the run's arguments, ``changes`` applied to them."""
    # Not dataclasses.replace: a second __post_init__ resets accelerate's process state, and a
    # process of several would train alone from then on.
    args = copy.copy(experiment.args)
    for name, value in changes.items():
        setattr(args, name, value)
    teacher = experiment.teacher if taught else NoTeacher()
    trainer = DistillationTrainer(
        model,
        args,
        teacher=teacher.model,
        teacher_cache=teacher.cache,
        train_dataset=experiment.corpus.train,
        eval_dataset=experiment.corpus.validation,
        data_collator=experiment.collator,
        processing_class=experiment.tokenizer,
    )
    # Either prints dictionaries among the results; the curves are in results.json.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not args.disable_tqdm:
        trainer.add_callback(Progress(title))
    return trainer


def evaluate(experiment: Experiment, title: str, model: PreTrainedModel) -> dict[str, Any]:
    """One row of the table: size of ``model``, and its quality on the held-out text."""
    is_teacher = model is experiment.teacher.model
    row: dict[str, Any] = {"name": title, **_size(model)}
    if experiment.task is ENCODER:
        ours = experiment.vectors[title] = sentence_vectors(experiment, model)
        return row if is_teacher else row | geometry.compare(ours, experiment.vectors["teacher"])
    # Agreement with the teacher is measured for every student, one trained on labels only, too.
    alpha = 0.0 if is_teacher else experiment.args.alpha or 0.5
    changes = LABELS_ONLY | {"alpha": alpha}
    trainer = make_trainer(experiment, title, model, not is_teacher, **changes)
    metrics = trainer.evaluate()
    itself = {"divergence": 0.0, "agreement": 1.0} if is_teacher else {}
    return row | itself | {key: metrics[name] for key, name in MEASURED.items() if name in metrics}


def _size(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "parameters": models.parameter_count(model),
        "megabytes": models.weight_bytes(model) / 1e6,
    }


def teacher_row(experiment: Experiment) -> dict[str, Any]:
    """The table's first row; of a teacher whose model is not here it has the size only."""
    teacher = experiment.teacher
    if teacher.model is None:
        return {"name": "teacher", "parameters": teacher.parameters}
    return evaluate(experiment, "teacher", teacher.model)


@torch.no_grad()
def sentence_vectors(experiment: Experiment, model: PreTrainedModel) -> Tensor:
    """Pooled vectors [N, D] of all held-out examples, on the CPU."""
    data = experiment.corpus.validation
    items = (data[i] for i in range(len(data)))
    found: list[Tensor] = []
    model.eval()
    for batch in batches(items, experiment.args.per_device_eval_batch_size):
        moved = {k: v.to(model.device) for k, v in experiment.collator(batch).items()}
        hidden = model(**moved).last_hidden_state
        how = experiment.args.pooling or "mean"
        found.append(pooled(hidden, moved["attention_mask"], how=how).cpu())
    return torch.cat(found)


def arms_of(experiment: Experiment) -> list[tuple[str, dict[str, Any]]]:
    """The trainings of a run, and the changes of the arguments that each is made with."""
    arms: list[tuple[str, dict[str, Any]]] = []
    if experiment.task is ENCODER:
        if experiment.has_baseline:
            arms.append(("output only", OUTPUT_ONLY))
    elif experiment.has_baseline or not experiment.args.uses_teacher:
        arms.append(("labels only", LABELS_ONLY))
    if experiment.args.uses_teacher:
        arms.append(("distilled", {}))
    return arms


def arm_trainer(
    experiment: Experiment,
    arm: str,
    student: PreTrainedModel,
    changes: dict[str, Any],
    output: Path,
) -> DistillationTrainer:
    """The trainer of one arm, which writes its checkpoints into the arm's own folder."""
    # Blocks have no padding, but may hold the token that batches of examples are padded with.
    counted = "all" if isinstance(experiment.corpus.train, TokenBlocks) else "non_padding"
    folder = output / ARM_FOLDERS[arm]
    changes = changes | {"output_dir": str(folder), "include_num_input_tokens_seen": counted}
    return make_trainer(experiment, arm, student, True, **changes)


def train(
    experiment: Experiment, arm: str, student: PreTrainedModel, changes: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train ``student`` in place; returns (training numbers of the table's row, log history)."""
    trainer = arm_trainer(experiment, arm, student, changes, experiment.output)
    last = trainer.newest_checkpoint()
    started = time.perf_counter()
    with contextlib.suppress(FloatingPointError):  # told of by diverged()
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    seconds = time.perf_counter() - started
    args, folder = trainer.args, Path(str(trainer.args.output_dir))
    if args.process_index == 0 and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    steps = trainer.state.global_step
    first_step = 0 if last is None else int(last.name.rsplit("-", 1)[1])
    tokens = trainer.state.num_input_tokens_seen
    share = (steps - first_step) / max(1, steps)
    row = {
        "train_seconds": seconds,
        "train_tokens_per_second": tokens * share / seconds,
        "steps": steps,
        "tokens_seen": tokens,
        "seed": args.seed,
        "resumed_from_step": first_step,
    }
    return row, trainer.state.log_history


def diverged(student: PreTrainedModel, log: list[dict[str, Any]]) -> str | None:
    """What is NaN or infinite after a training, in words; None: nothing is."""
    weight = not_finite(student)
    if weight is not None:
        return f"its weights are not finite ({weight})"
    for entry in log:
        for name in ("loss", "train_loss"):
            value = entry.get(name, 0.0)
            if value is None or not math.isfinite(value):
                return f"its {name} was not finite at step {entry['step']}"
    return None


@dataclasses.dataclass
class _Run:
    """What a run has found so far."""

    experiment: Experiment
    started: float
    rows: list[dict[str, Any]]
    curves: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    saved: bool = False  #: the student

    def results(self) -> dict[str, Any]:
        """What ``results.json`` holds."""
        seconds = time.perf_counter() - self.started
        return report.results(self.experiment, self.rows, self.curves, self.problems, seconds)

    def keep(self, weights: str | None) -> None:
        """Write the trained student, and what is known of the run: whatever comes may fail.

        Args:
            weights: the name of one that is not finite.
        """
        if self.experiment.args.process_index != 0:
            return
        folder = self.experiment.output / STUDENT_FOLDER
        if weights is None:
            with report.told(self.problems, f"{folder}: not saved"):
                report.save_student(self.experiment, folder)
                self.saved = True
        else:
            self.problems.append(f"{folder}: not saved, since {weights} is not finite")
        with report.told(self.problems, f"{RESULTS}: not written"):
            report.write_results(self.experiment.output, self.results())

    def write(self) -> None:
        """Everything else."""
        output = self.experiment.output
        self.problems += report.write(self.experiment, self.results(), output, self.saved)

    def measure(self, row: dict[str, Any], student: PreTrainedModel) -> None:
        """Add what the held-out text says to the row of a trained student."""
        with report.told(self.problems, f"{row['name']}: not evaluated"):
            row |= evaluate(self.experiment, row["name"], student)
            loss = row.get("loss", 0.0)
            if not math.isfinite(loss):
                self.problems.append(f"{row['name']}: its held-out loss is {loss}")

    def measure_speeds(self, timed: dict[str, PreTrainedModel]) -> None:
        """Add the models' speeds to their rows."""
        with report.told(self.problems, "speeds: not measured"):
            speeds = forward_speeds(self.experiment, timed)
            for row in self.rows:
                row |= speeds.get(row["name"], {})


def run(experiment: Experiment) -> dict[str, Any]:
    """Evaluate, train, evaluate, write results; returns what ``results.json`` holds.

    A student is saved as soon as it is trained, unless it has diverged. What goes wrong from then
    on is in ``problems``, a list of lines.
    """
    main_process = experiment.args.process_index == 0
    started = time.perf_counter()
    if experiment.run_args.overwrite_output_dir and main_process:
        remove_checkpoints(experiment.output)
    rows = [
        teacher_row(experiment),
        evaluate(experiment, "student, untrained", experiment.student),
    ]
    found = _Run(experiment, started, rows)
    arms = arms_of(experiment)
    timed = experiment.teacher.models
    for position, (arm, changes) in enumerate(arms):
        last = position == len(arms) - 1
        student = experiment.student if last else copy.deepcopy(experiment.student)
        training, found.curves[arm] = train(experiment, arm, student, changes)
        title = f"student, {arm}"
        timed[title] = student
        row = {"name": title, **_size(student)} | training
        rows.append(row)
        wrong = diverged(student, found.curves[arm])
        if wrong is not None:
            found.problems.append(f"{title}: {wrong}")
        if last:
            found.keep(not_finite(student))
        found.measure(row, student)
    if main_process:  # the others are idle, so that nothing competes
        found.measure_speeds(timed)
        found.write()
    return found.results()
