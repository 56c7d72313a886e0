"""The options of :class:`kdkernels.training.DistillationTrainer`, checked at construction."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .. import divergences
from ..dispatch import available_backends
from ..dtypes import WEIGHT_DTYPES
from ..entries import TAILS
from ..options import DIVISOR, VOCAB_POLICIES, divides
from . import schedules
from .terms import TermArguments

logger = logging.getLogger(__name__)

FUSED_LINEAR = ("auto", "true", "false")
#: Options of ``TrainingArguments`` -> the least value with which training can start.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
}
#: What the base class reads of ``optim_args``; it drops the rest. Other optimizers read their own.
_OPTIM_ARGS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}


@dataclass
class DistillationArguments(TermArguments, TrainingArguments):
    """``transformers.TrainingArguments`` plus the options of the distillation loss and its terms.

    ``label_smoothing_factor`` of the base class is the smoothing of the label term. A bad value
    raises ValueError that names the option, the value and what is allowed.
    """

    output_dir: str | None = field(
        default="distilled", metadata={"help": "Folder for all results."}
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Softens both distributions; > 0. Usual: 1 for language models, 2 to 4."},
    )
    alpha: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the distillation term in [0, 1]; the labels get 1 - alpha. 0 trains "
            "on labels only (the teacher is not run), 1 on the teacher only."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Distance of student and teacher: " + ", ".join(divergences.names()) + "."
        },
    )
    beta: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the teacher in the mixture of jsd and the skewed divergences."
        },
    )
    divergence_parameters: list[float] | None = field(
        default=None,
        metadata={"help": "All parameters of the divergence, e.g. 0.2 0.7 for alpha_beta."},
    )
    temperature_squared: bool = field(
        default=True,
        metadata={"help": "Multiply the distillation term by temperature squared (Hinton 2015)."},
    )
    z_loss: float = field(
        default=0.0, metadata={"help": "Weight of the squared log-normaliser of the student; >= 0."}
    )
    vocab_policy: str = field(
        default="error",
        metadata={
            "help": "Vocabularies of different size: error, or truncate (use the common prefix)."
        },
    )
    loss_backend: str | None = field(
        default=None,
        metadata={"help": "Backend of the loss by name; default: the best that can run."},
    )
    fused_linear: str = field(
        default="auto",
        metadata={
            "help": "Compute the loss from hidden states, so that logits exist only in tiles: auto "
            "(where the output layer of a language model can be found), true (or refuse) or false."
        },
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={"help": "Teacher weights: auto (as they are), float32, bfloat16, float16."},
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "Device of the teacher; default: the student's."}
    )
    cache_tail: str | None = field(
        default=None,
        metadata={
            "help": "What a teacher's cache with few entries of a row says of all others: "
            + ", ".join(TAILS)
            + " (see fused_topk_kd_loss); default: uniform, of samples none."
        },
    )
    # The base class replaces a NaN loss in the log by the running mean, at the price of one host
    # synchronisation per micro-batch. A loss library shows NaN and does not synchronise.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and inf losses in the log."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_inherited()
        self._check_has_effect()
        self.check_terms()
        self._check_schedules()
        self._check_number("temperature", self.temperature, divides(self.temperature), DIVISOR)
        self._check_number("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]")
        self._check_number("z_loss", self.z_loss, self.z_loss >= 0, ">= 0")
        smoothing = self.label_smoothing_factor
        self._check_number("label_smoothing_factor", smoothing, 0 <= smoothing < 1, "in [0, 1)")
        self._check_choice("divergence", self.divergence, divergences.names())
        self.fused_linear = str(self.fused_linear).lower()  # True and False, too
        self._check_choice("fused_linear", self.fused_linear, FUSED_LINEAR)
        self._check_choice("vocab_policy", self.vocab_policy, VOCAB_POLICIES)
        self._check_choice("teacher_dtype", self.teacher_dtype, WEIGHT_DTYPES)
        self.resolved_divergence()
        if self.cache_tail is not None:
            self._check_choice("cache_tail", self.cache_tail, TAILS)
        if self.teacher_device is not None:
            self._check_device("teacher_device", self.teacher_device)
        if self.loss_backend is not None:
            self._check_backend(self.loss_backend)
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process: start with `accelerate launch` or "
                "`torchrun`, or set CUDA_VISIBLE_DEVICES to one of them (no nn.DataParallel)"
            )

    def _check_schedules(self) -> None:
        """Evaluations are comparable along a run: they use what the schedules end with."""
        if self.alpha_schedule is not None:
            ends = self.alpha_over_time()
            self._check_number("alpha_schedule", ends.lowest, ends.lowest >= 0, "in [0, 1]")
            self._check_number("alpha_schedule", ends.highest, ends.highest <= 1, "in [0, 1]")
            self._take_end("alpha", ends)
        if self.temperature_schedule is not None:
            ends = self.temperature_over_time()
            for end in (ends.lowest, ends.highest):
                self._check_number("temperature_schedule", end, divides(end), DIVISOR)
            self._take_end("temperature", ends)

    def _take_end(self, name: str, schedule: schedules.Schedule) -> None:
        """``schedule``'s last value for ``name``; a warning if that was something else."""
        given = getattr(self, name)
        if given not in (_default(self, name), schedule.end):
            logger.warning(f"{name}: {given} is not used; {name}_schedule stands for it")
        setattr(self, name, schedule.end)

    def _check_inherited(self) -> None:
        """Numbers of the base class that would only fail, or do nothing, once training starts."""
        if self.output_dir == "":
            raise ValueError("output_dir: '' names no folder")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}: {value} is not at least {least}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**32:
                raise ValueError(f"{name}: {value} is not in 0..2^32 - 1")
        for name in ("logging", "eval", "save"):
            value = getattr(self, f"{name}_steps")
            if getattr(self, f"{name}_strategy") == "steps" and not value > 0:
                raise ValueError(f"{name}_steps: {value} is not greater than 0")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None:
                self._check_number(name, value, value >= 0, ">= 0")
        self._check_number("num_train_epochs", self.num_train_epochs, True, "a number")

    def _check_has_effect(self) -> None:
        """Options that are given, and that nothing would read; ValueError names them."""
        lengths = self.train_sampling_strategy == "group_by_length"
        optim = str(getattr(self.optim, "value", self.optim))
        low_rank = any(name in optim for name in ("galore", "apollo"))
        idle = {
            "gradient_checkpointing_kwargs": not self.gradient_checkpointing
            and "gradient_checkpointing",
            "liger_kernel_config": not self.use_liger_kernel and "use_liger_kernel",
            "length_column_name": not lengths and "train_sampling_strategy group_by_length",
            "optim_target_modules": not low_rank and "a GaLore or APOLLO optim",
            "greater_is_better": self.metric_for_best_model is None and "metric_for_best_model",
            "beta": self.divergence_parameters is not None and "no divergence_parameters",
        }
        for name, needed in idle.items():
            if needed:
                refuse_idle(self, name, f"; it needs {needed}")
        if self.label_names not in (None, [], ["labels"]):
            raise ValueError(
                f"label_names: {self.label_names!r} is not ['labels'], the only ones that are read"
            )
        if "loss" in self.include_for_metrics:
            raise ValueError(
                "include_for_metrics: 'loss' is not kept by batches; the evaluation's loss is a "
                "mean over all tokens"
            )
        given = [part.partition("=")[0].strip() for part in (self.optim_args or "").split(",")]
        for name in filter(None, given):
            if name not in _OPTIM_ARGS.get(optim, (name,)):
                raise ValueError(f"optim_args: {name!r} has no effect on {optim}")

    @staticmethod
    def _check_number(name: str, value: float, allowed: bool, interval: str) -> None:
        if not (allowed and math.isfinite(value)):
            raise ValueError(f"{name}: {value!r} is not allowed; it must be finite and {interval}")

    @staticmethod
    def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")

    @staticmethod
    def _check_device(name: str, value: str) -> None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        here = {"cpu": 1}
        if accelerator is not None:
            here[accelerator.type] = torch.accelerator.device_count()
        try:
            device = torch.device(value)
        except (RuntimeError, TypeError):
            device = None
        if device is None or (device.index or 0) >= here.get(device.type, 0):
            devices = ", ".join(f"{count} {kind}" for kind, count in here.items())
            raise ValueError(f"{name}: {value!r} is no device of this machine; it has {devices}")

    @staticmethod
    def _check_backend(name: str) -> None:
        backends = available_backends()
        if name not in backends:
            raise ValueError(f"loss_backend: {name!r} is not one of {', '.join(backends)}")
        if backends[name]:
            raise ValueError(f"loss_backend: {name!r} cannot run: {'; '.join(backends[name])}")

    def alpha_over_time(self) -> schedules.Schedule:
        """``alpha_schedule``, or the constant ``alpha``."""
        given = self.alpha if self.alpha_schedule is None else self.alpha_schedule
        return schedules.parse("alpha_schedule", given)

    def temperature_over_time(self) -> schedules.Schedule:
        """``temperature_schedule``, or the constant ``temperature``."""
        given = self.temperature if self.temperature_schedule is None else self.temperature_schedule
        return schedules.parse("temperature_schedule", given)

    @property
    def uses_teacher(self) -> bool:
        """Whether anything is learnt from the teacher at all."""
        return self.alpha_over_time().highest > 0 or len(self.resolved_terms()) > 1

    def resolved_divergence(self) -> divergences.Divergence:
        """The object that ``divergence``, ``beta`` and ``divergence_parameters`` name."""
        if self.divergence_parameters is None:
            return divergences.resolve(self.divergence, self.beta)
        try:
            return divergences.build(self.divergence, self.divergence_parameters).canonical()
        except TypeError as error:
            raise ValueError(
                f"divergence_parameters: {self.divergence_parameters!r} do not fit "
                f"{self.divergence!r} ({error})"
            ) from error


def refuse_idle(options: Any, name: str, reason: str) -> None:
    """ValueError for an option of a dataclass that is set though nothing would read it."""
    value = getattr(options, name)
    if value != _default(options, name):
        raise ValueError(f"{name}: {value!r} has no effect{reason}")


def _default(options: Any, name: str) -> Any:
    return type(options).__dataclass_fields__[name].default
