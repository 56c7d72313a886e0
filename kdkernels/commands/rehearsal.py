"""The end of a run, once on nothing: what would be lost after hours is refused before them."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from ..training import checkpoints, models
from ..training.folders import on_trial
from ..training.tasks import ENCODER
from ..training.trainer import DistillationTrainer
from . import report
from .distill import arm_trainer, arms_of
from .experiment import Experiment
from .output import ARM_FOLDERS, STUDENT_FOLDER

#: Metrics of an evaluation that transformers adds.
_MEASURED = ("runtime", "samples_per_second", "steps_per_second")


def on_first_process(experiment: Experiment, rehearsal: Callable[[Experiment, Path], None]) -> None:
    """Run ``rehearsal`` in a folder of the output that does not stay.

    ValueError (one line) in every process for whatever is raised.
    """
    problem = None
    if experiment.args.process_index == 0:
        try:
            with on_trial(experiment.output) as scratch:
                rehearsal(experiment, scratch)
        except Exception as error:
            problem = str(error)
            if not isinstance(error, ValueError | OSError):  # others do not explain
                problem = f"{type(error).__name__}: {problem}"
    if experiment.args.world_size > 1:  # the others must not wait for a process that has stopped
        (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise ValueError(problem)


def rehearse(experiment: Experiment) -> None:
    """ValueError (one line) if the run's trainings, checkpoints or results cannot be made.

    Trainers are built, the student is saved as a checkpoint would be, and the report is written of
    numbers that stand for results.
    """
    on_first_process(experiment, _rehearse)


def _rehearse(experiment: Experiment, scratch: Path) -> None:
    arms = arms_of(experiment)
    if experiment.args.resume_from_checkpoint is None:
        _check_space(experiment, len(arms), scratch)
    trainers = {}
    for arm, changes in arms:
        trainer = arm_trainer(experiment, arm, experiment.student, changes, scratch)
        check_training(trainer)
        trainers[arm] = trainer
    if experiment.args.resume_from_checkpoint is not None:
        _check_checkpoints(experiment.output, trainers)
    # The last one is the student's, and has all terms.
    trainer._save(str(scratch / STUDENT_FOLDER))
    vectors = {}
    outcome = _imagined(experiment, list(trainers))
    if experiment.task is ENCODER:
        vectors = {row["name"]: torch.eye(3) for row in outcome["rows"]}
    problems = report.write(dataclasses.replace(experiment, vectors=vectors), outcome, scratch)
    if problems:
        raise ValueError(problems[0])


def check_training(trainer: DistillationTrainer) -> None:
    """ValueError if batches, optimizer, schedule or metric of a training cannot be had."""
    args = trainer.args
    try:
        loader = trainer.get_train_dataloader()
        batches = len(loader)
        trainer.get_eval_dataloader()
    except (ValueError, TypeError) as error:
        raise ValueError(f"dataloader: {error}") from error
    if batches < 1:
        raise ValueError(
            f"dataloader_drop_last: {trainer.num_examples(loader)} training examples are less than "
            f"one batch of {args.train_batch_size * args.world_size}, and nothing would be left to "
            "train on"
        )
    steps = args.max_steps
    if steps <= 0:
        updates = batches / args.gradient_accumulation_steps
        steps = max(1, math.ceil(updates * args.num_train_epochs))
    try:
        kind, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        # Some are made of the model itself; its parameters must not get their hooks twice.
        if not {"params", "model", "optimizer_dict"} & options.keys():
            optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
            trainer.create_scheduler(steps, optimizer)
    except Exception as error:  # each package has its own
        raise ValueError(f"optim, lr_scheduler_type: {type(error).__name__}: {error}") from error
    metric = args.metric_for_best_model
    if metric is not None and args.eval_strategy != "no":
        known = [*trainer.metric_names(), *_MEASURED]
        if metric.removeprefix("eval_") not in known:
            raise ValueError(
                f"metric_for_best_model: {metric!r} is not one of {', '.join(known)} "
                f"({Path(str(args.output_dir)).name})"
            )


def _check_space(experiment: Experiment, arms: int, place: Path) -> None:
    """ValueError if the disk cannot hold the weights that the run keeps at least."""
    args = experiment.args
    saved = 0 if args.save_strategy == "no" else arms
    needed = models.weight_bytes(experiment.student) * (1 + saved)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"output_dir: {str(experiment.output)!r}: {free / 1e9:.3g} GB are free, the weights of "
            f"the student and one checkpoint of each training take {needed / 1e9:.3g} GB"
        )


def _check_checkpoints(output: Path, trainers: dict[str, DistillationTrainer]) -> None:
    """ValueError unless some training can go on from a whole checkpoint."""
    damaged = []
    for arm, trainer in trainers.items():
        folder = output / ARM_FOLDERS[arm]
        newest, found = checkpoints.newest_whole(folder, *trainer.checkpoint_files())
        if newest is not None:
            return
        damaged += [f"{folder.name}/{line}" for line in found]
    told = "; ".join(damaged) or "none of this run's trainings"
    raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {str(output)!r} ({told})")


def _imagined(experiment: Experiment, arms: list[str]) -> dict[str, Any]:
    """What ``results.json`` could hold: every number that a run can have, as 1."""
    measured = ["spearman", "pearson", "cosine", "neighbours"]
    if experiment.task is not ENCODER:
        measured = ["loss", "perplexity", "divergence", "agreement", "accuracy"]
    names = ["teacher", "student, untrained", *(f"student, {arm}" for arm in arms)]
    common = ["parameters", "megabytes", "tokens_per_second", *measured]
    rows: list[dict[str, Any]] = [{"name": name} | dict.fromkeys(common, 1.0) for name in names]
    for row in rows[2:]:
        row |= dict.fromkeys(("steps", "tokens_seen", "seed", "train_seconds"), 1)
    logged = dict.fromkeys(("kd_loss", "ce_loss", "hidden_loss"), 1.0)
    curves = {arm: [logged | {"step": 1}] for arm in arms}
    return report.results(experiment, rows, curves, [], 1.0)
