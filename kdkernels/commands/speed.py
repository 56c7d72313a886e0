"""How fast the models of a run are: forwards that take turns on one batch."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..training.models import without_cache
from .experiment import Experiment

#: How long speeds are measured: until so many seconds have passed, within so many rounds.
_SPEED_SECONDS, _SPEED_ROUNDS = 6.0, (7, 31)
#: Tokens of the batch on a CPU: enough to keep it busy, few enough for many rounds.
_SPEED_TOKENS = 256


@torch.no_grad()
def forward_speeds(
    experiment: Experiment, timed: dict[str, PreTrainedModel]
) -> dict[str, dict[str, Any]]:
    """Title -> tokens per second of that model's forward alone, their spread, and every round.

    The models take turns on one batch of held-out text, each round in another order, so that
    whatever else the machine does meets all of them: medians over the same rounds are comparable.
    The first round warms up and is not counted, nor is padding.
    """
    on_cpu = experiment.args.device.type == "cpu"
    data = experiment.corpus.validation.evenly(_SPEED_TOKENS if on_cpu else None)
    size = min(experiment.args.per_device_eval_batch_size, len(data))
    batch = dict(experiment.collator([data[i] for i in range(size)]))
    batch.pop("labels", None)
    mask = batch.get("attention_mask")
    tokens = int(batch["input_ids"].numel() if mask is None else mask.sum())
    names = list(timed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    fewest, most = _SPEED_ROUNDS
    started = 0.0
    for number in range(most + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(_forward_seconds(timed[name], batch))
        if number == 0:
            started = time.perf_counter()
        if number >= fewest and time.perf_counter() - started > _SPEED_SECONDS:
            break
    return {name: _speed(tokens, counted) for name, (_, *counted) in seconds.items()}


def _speed(tokens: int, seconds: list[float]) -> dict[str, Any]:
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "tokens_per_second": tokens / median,
        "speed_spread": (third - first) / 2 / median,
        "forward_seconds": seconds,
    }


def _forward_seconds(model: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    device = next(model.parameters()).device
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    model.eval()
    _wait_for(device)
    started = time.perf_counter()
    model(**moved, **without_cache(model))
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
