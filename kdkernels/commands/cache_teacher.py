"""``kdkernels cache-teacher``: a teacher's outputs for the texts of a run, into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..training.arguments import DistillationArguments
from ..training.tasks import TASKS
from ..training.teacher_cache import CacheInfo, cache_teacher, check_can_be_written, fingerprint_of
from ..training.teachers import ModelTeacher
from .experiment import (
    DataArguments,
    ModelArguments,
    RunArguments,
    check_model,
    check_teacher,
    collator_for,
    items_of,
    prepare_inputs,
    served_cache,
)


def write_cache(
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    args: DistillationArguments,
    configuration: dict[str, Any],
) -> CacheInfo:
    """Run the teacher over the texts and write what it says; ValueError on bad input."""
    if run_args.teacher_cache is None:
        raise ValueError("teacher_cache: name the folder that is to be written")
    check_teacher(model_args, run_args, args, reads_cache=False)
    if model_args.teacher_url is not None:
        return _write_served(model_args, data_args, run_args, args)
    for name in ("cache_top_k", "cache_samples"):
        if args.temperature_schedule is not None and getattr(run_args, name) is not None:
            raise ValueError(f"{name}: such a cache has one temperature, not a schedule")
    check_can_be_written(Path(run_args.teacher_cache), TASKS[model_args.task])
    inputs = prepare_inputs(model_args, data_args, args, labels_needed=False)
    assert inputs.teacher is not None
    model = inputs.teacher.model(args.teacher_dtype, inputs.task)
    check_model("teacher", model, inputs.corpus)
    teacher = ModelTeacher(model)
    teacher.place(args)
    return cache_teacher(
        teacher.model,
        inputs.tokenizer,
        items_of(inputs.corpus),
        collator_for(inputs.corpus, inputs.tokenizer),
        run_args.teacher_cache,
        top_k=run_args.cache_top_k,
        samples=run_args.cache_samples,
        temperature=args.temperature,
        seed=args.seed,
        batch_size=args.per_device_eval_batch_size,
        fingerprint=fingerprint_of(inputs.teacher.name),
        name=inputs.teacher.name,
    )


def _write_served(
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    args: DistillationArguments,
) -> CacheInfo:
    """Ask the server for all texts; ValueError on bad input, RuntimeError if it fails."""
    inputs = prepare_inputs(model_args, data_args, args)
    cache = served_cache(inputs, model_args, run_args)
    ends = args.temperature_over_time()
    temperatures = {ends.lowest, ends.highest}
    divergences = {args.resolved_divergence().key}
    cache.check(inputs.task, [], temperatures, divergences, args.cache_tail)
    cache.fill(items_of(inputs.corpus))
    return cache.info
