"""``kdkernels init-student``: a student that starts from some of its teacher's layers."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..dtypes import WEIGHT_DTYPES
from ..losses.features import layer_map
from ..training import sentences
from ..training.folders import check_new, write_text, written_whole
from ..training.layer_configs import layer_count
from ..training.models import ModelSource, in_dtype, keep_layers, parse_layers
from ..training.redaction import redacted
from ..training.saving import repair_generation
from ..training.tasks import ENCODER, TASKS, check_can_be_loaded, check_config

_CARD = """# Untrained student of {teacher}

Layers {layers} (of {available}) of {teacher}, made with `kdkernels init-student`. It has not been
trained. The teacher's licence binds it.
"""


def choose(text: str, available: int) -> list[int]:
    """``"0,2,5-7"``, or ``"uniform:3"``: the layers that a uniform layer map would compare with."""
    kind, _, number = text.partition(":")
    if kind != "uniform":
        return parse_layers(text, available)
    if not number.isdigit() or not 1 <= int(number) <= available:
        raise ValueError(f"layers: {text!r} is not uniform:N with N in 1..{available}")
    return [theirs - 1 for _, theirs in layer_map("uniform", int(number), available)]


def make_student(
    teacher: str, layers: str, output: Path, *, task: str = "causal-lm", dtype: str = "float32"
) -> PreTrainedModel:
    """Write the student, its tokenizer and a card into ``output``; ValueError on bad input.

    Args:
        teacher: a folder, a hub name, or a .gguf file.
        layers: which to keep, from 0, as :func:`choose` reads them.
        output: a folder that does not exist or is empty.
        dtype: of the weights; "auto": as the teacher's are stored.
    """
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not one of {', '.join(TASKS)}")
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(WEIGHT_DTYPES)}")
    check_new("output_dir", output)
    source = ModelSource("teacher", teacher)
    source.check()
    config = source.config()
    check_config(TASKS[task], config, "teacher")
    available = layer_count(config, "teacher")
    kept = choose(layers, available)
    tokenizer, model = source.tokenizer(), source.model(dtype, TASKS[task])
    student = in_dtype(keep_layers(model, kept), dtype)
    check_can_be_loaded(TASKS[task], student.config, "teacher")
    repair_generation(student)
    card = _CARD.format(teacher=teacher, layers=", ".join(map(str, kept)), available=available)
    said = sentences.read(source) if TASKS[task] is ENCODER else None
    with written_whole(output) as new:
        student.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if said is not None and said.pooling is not None:
            sentences.write(new, said, student, source)
        write_text(new / "README.md", redacted(card))
    return student
