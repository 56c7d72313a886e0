"""Distillation inside ``transformers.Trainer``: :class:`DistillationTrainer` and its arguments.

No mathematics here: the loss is :func:`kdkernels.fused_kd_loss`, which the trainer calls once per
micro-batch. What this file owns is bookkeeping that has to be exact: which denominator the loss has
under gradient accumulation and several processes, which numbers are logged, and that the teacher
stays out of the optimizer and of the checkpoints.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from . import divergences
from .dispatch import available_backends
from .functional import KDLossOutput, fused_kd_loss
from .models import refuse_unless_causal, tokenizer_difference, vocab_size

VOCAB_POLICIES = ("error", "truncate")
TEACHER_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class DistillationArguments(TrainingArguments):
    """``transformers.TrainingArguments`` plus the options of the distillation loss.

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
    teacher_dtype: str = field(
        default="auto",
        metadata={"help": "Teacher weights: auto (as they are), float32, bfloat16, float16."},
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "Device of the teacher; default: the student's."}
    )
    # The base class replaces a NaN loss in the log by the running mean, at the price of one host
    # synchronisation per micro-batch. A loss library shows NaN and does not synchronise.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and inf losses in the log."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("temperature", self.temperature, self.temperature > 0, "> 0")
        self._check_number("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]")
        self._check_number("z_loss", self.z_loss, self.z_loss >= 0, ">= 0")
        smoothing = self.label_smoothing_factor
        self._check_number("label_smoothing_factor", smoothing, 0 <= smoothing < 1, "in [0, 1)")
        self._check_choice("divergence", self.divergence, divergences.names())
        self._check_choice("vocab_policy", self.vocab_policy, VOCAB_POLICIES)
        self._check_choice("teacher_dtype", self.teacher_dtype, TEACHER_DTYPES)
        self.resolved_divergence()
        if self.loss_backend is not None:
            self._check_backend(self.loss_backend)
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process: start with `accelerate launch` or "
                "`torchrun`, or set CUDA_VISIBLE_DEVICES to one of them (no nn.DataParallel)"
            )

    @staticmethod
    def _check_number(name: str, value: float, allowed: bool, interval: str) -> None:
        if not (allowed and math.isfinite(value)):
            raise ValueError(f"{name}: {value!r} is not allowed; it must be finite and {interval}")

    @staticmethod
    def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")

    @staticmethod
    def _check_backend(name: str) -> None:
        backends = available_backends()
        if name not in backends:
            raise ValueError(f"loss_backend: {name!r} is not one of {', '.join(backends)}")
        if backends[name]:
            raise ValueError(f"loss_backend: {name!r} cannot run: {'; '.join(backends[name])}")

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


class Sums:
    """Named sums kept on the device: adding never synchronises, reading does once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            # float64, so that a long evaluation does not lose digits; MPS has none.
            wide = value.float() if value.device.type == "mps" else value.double()
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide

    @property
    def empty(self) -> bool:
        return not self._sums

    def take(self, trainer: Trainer, reduction: str) -> dict[str, float]:
        """Every sum, reduced ("mean" or "sum") over processes; the sums are empty afterwards."""
        names, stacked = list(self._sums), list(self._sums.values())
        self._sums = {}
        if not stacked:
            return {}
        reduced = trainer.accelerator.reduce(torch.stack(stacked), reduction=reduction)
        return dict(zip(names, reduced.tolist(), strict=True))


class DistillationTrainer(Trainer):
    """``transformers.Trainer`` for a causal student, ``alpha * T^2 * D + (1 - alpha) * CE``.

    The denominator is the number of predicted tokens of the whole update (all micro-batches, and
    all processes unless ``average_tokens_across_devices=False``), so the update does not depend on
    how a batch is cut. Batches hold ``labels`` in the Hugging Face convention: not shifted, -100
    where nothing is to be learnt. A batch without any label has loss 0 and gradient 0.

    The teacher is switched to ``eval()``, its parameters to ``requires_grad=False``; it is moved
    (in place, as ``nn.Module.to`` does) to ``args.teacher_dtype`` and ``args.teacher_device``.
    It never enters the optimizer, a wrapper or a checkpoint, and is not run when ``alpha`` is 0.

    Logged next to ``loss``: ``kd_loss`` (with T^2, without alpha), ``ce_loss`` (nats per token),
    ``agreement`` (share of tokens with the same argmax as the teacher), ``accuracy``. Evaluation
    logs them with the prefix ``eval_``, averaged over tokens, and ``eval_perplexity =
    exp(ce_loss)``; there, labels are never smoothed.

    Args:
        model: the student; or leave it out and give ``model_init``.
        args: :class:`DistillationArguments`.
        teacher: a causal language model; required unless ``args.alpha`` is 0.
        teacher_processing_class: the teacher's tokenizer; given together with ``processing_class``,
            the two must map the same tokens to the same ids.
        trainer_kwargs: everything else that ``transformers.Trainer`` takes.

    Raises:
        TypeError: ``args`` is not a :class:`DistillationArguments`.
        ValueError: no teacher, not a causal language model, different vocabularies or tokenizers,
            a teacher that shares parameters with the student, or ``compute_loss_func``.
    """

    args: DistillationArguments
    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        if not isinstance(args, DistillationArguments):
            raise TypeError(f"args: {type(args).__name__} is not a DistillationArguments")
        if trainer_kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: not used here; the loss is fused_kd_loss")
        if teacher is None and args.alpha > 0:
            raise ValueError(
                f"teacher: None, but alpha = {args.alpha} needs one (alpha=0 does not)"
            )
        super().__init__(model=model, args=args, **trainer_kwargs)
        # Both make the base class count the predicted tokens of an update, for any architecture:
        # the labels are shifted inside the loss, whatever the model's own loss would do.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.teacher = teacher
        self._divergence = args.resolved_divergence()
        self._logged = Sums()
        self._log_first_step = 0
        self._evaluated = Sums()
        refuse_unless_causal(self.model.config, "model")
        if teacher is not None:
            self._check_teacher(teacher, teacher_processing_class)
            self._place_teacher(teacher)

    def _check_teacher(
        self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        refuse_unless_causal(teacher.config, "teacher")
        own = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ValueError("teacher: it shares parameters with the student; pass a deep copy")
        student_vocab, teacher_vocab = vocab_size(self.model), vocab_size(teacher)
        if student_vocab != teacher_vocab and self.args.vocab_policy == "error":
            raise ValueError(
                f"teacher: vocabulary of {teacher_vocab}, the student's has {student_vocab}; "
                "they must be equal, or vocab_policy='truncate'"
            )
        if tokenizer is not None and isinstance(self.processing_class, PreTrainedTokenizerBase):
            common = None if student_vocab == teacher_vocab else min(student_vocab, teacher_vocab)
            difference = tokenizer_difference(self.processing_class, tokenizer, common)
            if difference is not None:
                raise ValueError(f"teacher_processing_class: tokenizers differ: {difference}")

    def _place_teacher(self, teacher: PreTrainedModel) -> None:
        teacher.requires_grad_(False).eval()
        module: nn.Module = teacher  # transformers hides the signature of `to`
        if self.args.teacher_dtype != "auto":
            module.to(getattr(torch, self.args.teacher_dtype))
        if self.args.teacher_device is not None:
            module.to(self.args.teacher_device)
        elif getattr(teacher, "hf_device_map", None) is None:
            module.to(self.args.device)
        takes_cache = "use_cache" in inspect.signature(teacher.forward).parameters
        self._teacher_kwargs = {"use_cache": False} if takes_cache else {}

    # ---- the loss ------------------------------------------------------------------------------

    def teacher_logits(self, inputs: dict[str, Any]) -> Tensor | None:
        """Logits [B, S, V] of the teacher on the student's device; None when it is not needed."""
        if self.teacher is None or self.args.alpha == 0:
            return None
        device = next(self.teacher.parameters()).device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with torch.no_grad():
            logits = self.teacher(**moved, **self._teacher_kwargs).logits
        return logits.to(self.args.device)

    def distillation_loss(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, **options: Any
    ) -> KDLossOutput:
        """The one call of ``fused_kd_loss``; ``options`` override the arguments."""
        args = self.args
        settings: dict[str, Any] = {
            "temperature": args.temperature,
            "alpha": args.alpha if teacher_logits is not None else 0.0,
            "divergence": self._divergence,
            "temperature_squared": args.temperature_squared,
            "label_smoothing": args.label_smoothing_factor,
            "z_loss": args.z_loss,
            "vocab_policy": args.vocab_policy,
            "backend": args.loss_backend,
        }
        # With alpha = 0 the teacher term is multiplied by 0; the student stands in for the teacher.
        teacher_logits = student_logits.detach() if teacher_logits is None else teacher_logits
        output = fused_kd_loss(
            student_logits,
            teacher_logits,
            labels,
            shift=True,
            return_outputs=True,
            **settings | options,
        )
        assert isinstance(output, KDLossOutput)
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Loss of one micro-batch over ``num_items_in_batch`` tokens (None: its own tokens)."""
        labels, inputs = self._take_labels(inputs)
        outputs = model(**inputs)
        teacher_logits = self.teacher_logits(inputs)
        num_items = num_items_in_batch
        parts = self.distillation_loss(outputs.logits, teacher_logits, labels, num_items=num_items)
        # DistributedDataParallel averages gradients over processes; the denominator already counts
        # the tokens of all of them.
        scale = 1
        if self.args.average_tokens_across_devices and num_items is not None:
            scale = self.accelerator.num_processes // self.get_tp_size()
        if model.training:
            self._observe_step(parts, labels, num_items, scale)
        loss = parts.loss * scale
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def _take_labels(inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        if inputs.get("labels") is None:
            raise ValueError(
                f"labels: missing in the batch (it has {', '.join(inputs)}); distillation needs "
                "them to know which tokens count, -100 marks those that do not"
            )
        return inputs["labels"], {k: v for k, v in inputs.items() if k != "labels"}

    # ---- what is logged ------------------------------------------------------------------------

    def _parts(self, parts: KDLossOutput, labels: Tensor) -> dict[str, Tensor]:
        """The logged parts, each as a sum over tokens divided by the denominator of ``parts``.

        ``agreement`` and ``accuracy`` come as shares of this batch's tokens and are turned into
        numbers of tokens.
        """
        tokens = labels[..., 1:].ne(-100).sum()
        assert parts.ce_loss is not None and parts.accuracy is not None  # there are labels
        named = {"ce_loss": parts.ce_loss, "accuracy": parts.accuracy * tokens}
        if self.teacher is not None and self.args.alpha > 0:
            named |= {"kd_loss": parts.kd_loss, "agreement": parts.agreement * tokens}
        return named

    def _observe_step(
        self, parts: KDLossOutput, labels: Tensor, num_items: Tensor | int | None, scale: int
    ) -> None:
        named = self._parts(parts, labels)
        denominator = torch.as_tensor(
            labels[..., 1:].ne(-100).sum() if num_items is None else num_items
        ).clamp(min=1)
        for share in ("accuracy", "agreement"):
            if share in named:
                named[share] = named[share] / denominator
        if self._logged.empty:
            self._log_first_step = self.state.global_step
        self._logged.add(**{name: value * scale for name, value in named.items()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to the training log: means over the same steps as ``loss``."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._log_first_step)
            parts = self._logged.take(self, "mean")
            logs |= {name: value / steps for name, value in parts.items()}
        super().log(logs, start_time)

    # ---- evaluation ----------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor | None, Tensor | None]:
        """Adds one batch to the token-weighted sums, from which the losses are computed."""
        labels, inputs = self._take_labels(self._prepare_inputs(inputs))
        counted = self._without_surplus(labels)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
            sums = self.distillation_loss(
                logits, self.teacher_logits(inputs), counted, num_items=1, label_smoothing=0.0
            )
        tokens = counted[..., 1:].ne(-100).sum()
        self._evaluated.add(tokens=tokens, loss=sums.loss.detach(), **self._parts(sums, counted))
        return (None, None, None) if prediction_loss_only else (None, logits, labels)

    def _without_surplus(self, labels: Tensor) -> Tensor:
        """Labels with -100 in the examples that only fill up the last batch of all processes."""
        state = self.accelerator.gradient_state
        if (
            self.accelerator.num_processes == 1
            or not state.end_of_dataloader
            or state.remainder < 1
        ):
            return labels
        first = self.accelerator.process_index * len(labels)
        real = torch.arange(first, first + len(labels), device=labels.device) < state.remainder
        return labels.masked_fill(~real[:, None], -100)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The base class's loop; losses and shares are means over all predicted tokens."""
        self._evaluated = Sums()
        mark = "_is_accelerate_prepared"
        marked = hasattr(self.model, mark)
        output = super().evaluation_loop(*args, **kwargs)
        if not marked:
            # An evaluation before any training marks the model as prepared, and training would
            # then leave it without DistributedDataParallel: every process would train alone.
            vars(self.model).pop(mark, None)
        prefix = kwargs.get("metric_key_prefix", "eval")
        sums = self._evaluated.take(self, "sum")
        tokens = sums.pop("tokens", 0.0)
        means = {name: value / max(tokens, 1.0) for name, value in sums.items()}
        if "ce_loss" in means:
            means["perplexity"] = _exp(means["ce_loss"])
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output


def _exp(value: float) -> float:
    """exp without OverflowError."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
