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
    collator_for,
    items_of,
    prepare_inputs,
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
    for name in ("cache_top_k", "cache_samples"):
        if args.temperature_schedule is not None and getattr(run_args, name) is not None:
            raise ValueError(f"{name}: such a cache has one temperature, not a schedule")
    check_can_be_written(Path(run_args.teacher_cache), TASKS[model_args.task])
    inputs = prepare_inputs(model_args, data_args, args, labels_needed=False)
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
        fingerprint=fingerprint_of(model_args.teacher),
        name=model_args.teacher,
    )
