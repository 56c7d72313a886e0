"""Distillation inside ``transformers.Trainer``: :class:`DistillationTrainer`.

No mathematics here: the response is :func:`kdkernels.fused_kd_loss`,
:func:`kdkernels.fused_topk_kd_loss` where a cache holds a few entries of a row, or
:func:`kdkernels.fused_linear_kd_loss` where output layers can be left out of the models' forward;
one of them is called once per micro-batch. Every other term is in :mod:`kdkernels.training.terms`.
What this file owns is bookkeeping that has to be exact: which denominator a term has under gradient
accumulation and several processes, which numbers are logged, and that the teacher stays out of the
optimizer and of the checkpoints.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..functional import KDLossOutput, fused_kd_loss, fused_topk_kd_loss
from ..linear import fused_linear_kd_loss
from ..topk import TopK
from . import checkpoints
from .arguments import DistillationArguments
from .folders import plain
from .models import describe
from .output_layer import Heads, Hidden, find_heads
from .recorder import Features, Needs, Recorder, output
from .redaction import is_secret
from .saving import not_finite, repair_generation
from .tasks import CAUSAL_LM, MASKED_LM, SEQUENCE, TOKEN, base_of, check_config, task_of
from .teacher_cache import TeacherCache
from .teachers import Student, check_columns, teacher_of
from .terms import EXAMPLE_TERMS, Counts

logger = logging.getLogger(__name__)

#: In a checkpoint: what the terms have learnt (projections, log variances, factors).
TERMS_FILE = "distillation_terms.safetensors"
_TERMS_NAME = "kdkernels_terms"


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
    """``transformers.Trainer`` with a teacher: ``alpha * T^2 * D + (1 - alpha) * CE`` and more.

    The student is a causal or masked language model, a sequence or token classifier, or an encoder
    without a head; the teacher is of the same kind. Either may be in a wrapper: an adapter of PEFT,
    ``torch.compile``, a module of your own; each gets the entries of a batch that its forward is
    made for. The loss is a weighted sum of terms
    (``args.terms``, :data:`kdkernels.training.terms.TERMS`): the response, which is the default,
    features of chosen layers, and relations. An encoder has no response and needs other terms.

    The response's denominator is the number of predicted tokens (or labelled examples) of the whole
    update (all micro-batches, and all processes unless ``average_tokens_across_devices=False``), so
    the update does not depend on how a batch is cut. Batches hold ``labels`` in the Hugging Face
    convention: not shifted, -100 where nothing is to be learnt. A batch without any label has loss
    0 and gradient 0. Where ``alpha`` is 1 batches may lack ``labels``: all that is no padding
    counts; evaluations then leave out what labels would say. Terms of tokens divide by the update's
    tokens that are no padding, terms of examples by its examples; a relation between examples
    exists within one micro-batch only.

    The teacher is switched to ``eval()``, its parameters to ``requires_grad=False``; it is moved
    (in place, as ``nn.Module.to`` does) to ``args.teacher_dtype`` and ``args.teacher_device``.
    It never enters the optimizer, a wrapper or a checkpoint, and is not run when ``alpha`` is 0 and
    there is no other term. What terms learn (projections) is trained with the student, saved beside
    it in checkpoints (``distillation_terms.safetensors``) and not a part of it.

    Where the output layer of a language model can be found, it is left out of the forward and the
    loss is computed from what goes into it, so that logits exist only in tiles
    (``args.fused_linear``, :mod:`kdkernels.training.output_layer`); not where outputs are asked for
    (``compute_metrics``, ``predict``).

    Logged next to ``loss``: ``kd_loss`` (with T^2, without alpha), ``ce_loss`` (nats per token),
    ``agreement`` (share of tokens with the same argmax as the teacher), ``accuracy``. Evaluation
    logs them with the prefix ``eval_``, averaged over tokens, and ``eval_perplexity =
    exp(ce_loss)`` of language models; there, labels are never smoothed. Every other term is logged
    as ``<term>_loss``, without its weight, and so is the loss of a mixture's router, ``aux_loss``,
    which is added where the student's configuration asks for it (``output_router_logits``).

    Training goes on (``train(resume_from_checkpoint=...)``) from a whole checkpoint only: ``True``
    takes the newest whole one and logs what is wrong with newer ones. A checkpoint of weights that
    are not finite is not written. ``hub_token`` is in no checkpoint.

    Args:
        model: the student; or leave it out and give ``model_init``.
        args: :class:`DistillationArguments`.
        teacher: a model for the student's task; required unless only labels are learnt.
        teacher_processing_class: the teacher's tokenizer; given together with ``processing_class``,
            the two must map the same tokens to the same ids.
        teacher_cache: instead of ``teacher``, for the response term only; it must hold every
            example of both data sets. That of a served teacher
            (:class:`~kdkernels.training.served.ServedCache`) is filled with them first.
        trainer_kwargs: everything else that ``transformers.Trainer`` takes.

    Raises:
        TypeError: ``args`` is not a :class:`DistillationArguments`.
        ValueError: no teacher, another task, different vocabularies, labels or tokenizers, a
            teacher that shares parameters with the student, layers that do not exist, reentrant
            checkpointing of what needs a gradient inside of a layer, or ``compute_loss_func``; by
            ``train``: a checkpoint that is damaged or incomplete.
        FloatingPointError: by ``train``: a checkpoint is due, and weights are NaN or infinite.
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
        teacher_cache: TeacherCache | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        if not isinstance(args, DistillationArguments):
            raise TypeError(f"args: {type(args).__name__} is not a DistillationArguments")
        if trainer_kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: not used here; the loss is fused_kd_loss")
        super().__init__(model=model, args=args, **trainer_kwargs)
        self._teacher = teacher_of(teacher, teacher_processing_class, teacher_cache)
        self._evaluated = Sums()
        self._resumes = False
        self._begin()

    def _begin(self) -> None:
        """All that follows from the student and the arguments.

        Once for each student: ``model_init`` makes another one for every training.
        """
        self._base = base_of(self.model)
        self.task = task_of(self._base)
        check_config(self.task, self._base.config, "model")
        # Both make the base class count the predicted tokens of an update, for any architecture:
        # the labels are shifted inside the loss, whatever the model's own loss would do.
        repaired = repair_generation(self._base)
        if repaired is not None:
            logger.warning(repaired)
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = self.task.shift
        # The base class would remember those of its first student.
        self._signature_columns: Any = None
        student = self._start_over()
        if self.task in (SEQUENCE, TOKEN):
            for name in ("train_dataset", "eval_dataset"):
                check_columns(self._base.config, getattr(self, name), name)
        self._weights, self._router_weight = student.weights, student.router_weight
        self._teacher.check(student)
        self.terms = self._teacher.begin(student)
        self._recorder = (
            Recorder(self.model, Needs(), "student") if self.terms is None else self.terms.student
        )
        if self._teacher.signature is not None:
            self._recorder.signature.beside(self._teacher.signature)
        self._heads = self._find_heads()
        heads = self._heads.found
        self._student_head, self._teacher_head = heads.get("student"), heads.get("teacher")

    def _start_over(self) -> Student:
        """What one training must not leave to the next one: sums, counts, and read arguments.

        A training also ends by an exception, and starts again with another batch size.
        """
        student = Student.of(self.model, self.task, self.args, self.processing_class)
        self._alpha, self._temperature = (
            self.args.alpha_over_time(),
            self.args.temperature_over_time(),
        )
        self._divergence = self.args.resolved_divergence()
        self._logged = Sums()
        self._log_first_step = 0
        self._update: Counts | None = None
        self._starts_update = True
        return student

    def _begin_if_new(self) -> None:
        if base_of(self.model) is not self._base:
            self._begin()

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The model that teaches; None: its cache does, or nobody. A twin can take its place."""
        return self._teacher.model

    @teacher.setter
    def teacher(self, model: PreTrainedModel) -> None:
        self._teacher.model = model

    @property
    def teacher_cache(self) -> TeacherCache | None:
        """The cache that teaches."""
        return self._teacher.cache

    # ---- output layers that are left out -------------------------------------------------------

    def _find_heads(self) -> Heads:
        """The student's and the teacher's output layers; none where logits are needed."""
        wanted = self.args.fused_linear
        if wanted == "false":
            return Heads({}, {})
        general = self._no_fused_linear()
        if general is None and wanted == "auto":
            general = self._slow_fused_linear()
        models: dict[str, nn.Module] = {"student": self.model, **self._teacher.models}
        if general is None:
            heads = find_heads(models, self.args.device)
        else:
            heads = Heads({}, dict.fromkeys(models, general))
        if heads.reasons and wanted == "true":
            raise ValueError(
                "fused_linear: " + "; ".join(f"{r}: {why}" for r, why in heads.reasons.items())
            )
        return heads

    def _no_fused_linear(self) -> str | None:
        """Why no output layer can be left out here."""
        if self.task not in (CAUSAL_LM, MASKED_LM):
            return f"a model for {self.task.name} has no logits over a vocabulary"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return (
                "FSDP and DeepSpeed manage the weights; fused_linear_kd_loss itself takes DTensors"
            )
        if self.args.torch_compile:
            return "torch_compile compiles the whole forward"
        if self.args.debug:
            return "debug looks at the logits"
        return None

    def _slow_fused_linear(self) -> str | None:
        """Why leaving it out can cost more than it saves."""
        if self.args.device.type != "cpu" and (self.args.bf16 or self.args.fp16):
            return "autocast multiplies in half precision, fused_linear_kd_loss as the weight is"
        return None

    def _say_heads(self) -> None:
        """One log line of what was found, when training starts."""
        language = self.task in (CAUSAL_LM, MASKED_LM)
        if any(self._heads) and language and self.is_world_process_zero():
            level = logging.WARNING if self._heads.reasons else logging.INFO
            logger.log(level, "fused_linear: logits %s", self._heads)

    # ---- the loss ------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """0 at the first update of the run, 1 at the last; what schedules are a function of."""
        return self.state.global_step / max(1, self.state.max_steps - 1)

    @property
    def _response_has_teacher(self) -> bool:
        return self.task.labels is not None and self._alpha.highest > 0

    def student_features(
        self, model: nn.Module, inputs: dict[str, Any], with_logits: bool = False
    ) -> Features:
        """One forward of the student, with what the terms compare; its logits if asked for."""
        return self._recorder.run(model, inputs, None if with_logits else self._student_head)

    def teacher_features(self, inputs: dict[str, Any]) -> Features | None:
        """What the teacher gives, on the student's device; None when it is not needed."""
        if not self._response_has_teacher and self.terms is None:
            return None
        return self._teacher.features(inputs, self.args.device, self._teacher_head)

    def distillation_loss(
        self,
        student: Tensor | Hidden,
        teacher: Tensor | Hidden | TopK | None,
        labels: Tensor,
        **options: Any,
    ) -> KDLossOutput:
        """The one call of the loss, on logits or hidden states; ``options`` override arguments."""
        args = self.args
        settings: dict[str, Any] = {
            "temperature": args.temperature,
            "alpha": args.alpha,
            "divergence": self._divergence,
            "temperature_squared": args.temperature_squared,
            "label_smoothing": args.label_smoothing_factor,
            "z_loss": args.z_loss,
            "vocab_policy": args.vocab_policy,
            "backend": args.loss_backend,
        } | options
        # With alpha = 0 the teacher term is multiplied by 0: any logits will do.
        if teacher is None:
            teacher = student.no_teacher() if isinstance(student, Hidden) else student.detach()
            settings["alpha"] = 0.0
        loss: Callable[..., Any] = fused_kd_loss
        if isinstance(teacher, TopK):
            loss = fused_topk_kd_loss
            student = _narrowed(student, self._teacher.width(self.task))
        if isinstance(student, Hidden) or isinstance(teacher, Hidden):
            loss = fused_linear_kd_loss
            for name in ("softcap", "scale"):
                settings[f"logit_{name}"] = tuple(
                    getattr(x, name, None) for x in (student, teacher)
                )
        output = loss(
            labels=labels,
            shift=self.task.shift,
            return_outputs=True,
            **_source("student", student),
            **_source("teacher", teacher),
            **settings,
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
        targets, inputs = self._take_labels(inputs)
        labels = targets.labels
        student = self.student_features(model, inputs, with_logits=return_outputs)
        teacher = self.teacher_features(inputs)
        num_items, progress = num_items_in_batch, self.progress
        parts = self._response(
            student,
            teacher,
            labels,
            num_items=num_items,
            alpha=self._alpha.at(progress),
            temperature=self._temperature.at(progress),
        )
        # DistributedDataParallel averages gradients over processes; the denominator already counts
        # the tokens of all of them.
        scale = 1
        if self.args.average_tokens_across_devices and num_items is not None:
            scale = self.accelerator.num_processes // self.get_tp_size()
        if self.terms is None or teacher is None:
            assert parts is not None
            values: dict[str, Tensor] = {}
            loss = parts.loss * self._weights["response"].at(progress)
        else:
            mask = _token_mask(inputs)
            own = Counts.of(mask)
            counts = own if num_items is None or self._update is None else self._update
            values = self.terms(student, teacher, mask, counts)
            response = {} if parts is None else {"response": parts.loss}
            loss = self._combined(model, response | values, own.examples / counts.examples)
        router = self._router_loss(student)
        if router is not None and labels is not None and self._router_weight:
            # The mean over the update's micro-batches, each counting as its tokens do.
            share = 1 if num_items is None else self._counted(labels) / max(1, num_items)
            values |= {"aux": router * share}
            loss = loss + self._router_weight * values["aux"]
        if model.training:
            self._observe_step(parts, targets, num_items, scale, values)
        loss = loss * scale
        return (loss, student.outputs) if return_outputs else loss

    def _response(
        self, student: Features, teacher: Features | None, labels: Tensor | None, **options: Any
    ) -> KDLossOutput | None:
        """The response term; None for a model without a head."""
        if labels is None:
            return None
        own, taught = student.response, None
        if own is None or isinstance(own, TopK):
            raise ValueError(f"model: {describe(self.model)} gives no logits")
        if teacher is not None and self._response_has_teacher:
            taught = teacher.response
            if taught is None:
                raise ValueError("teacher: its forward gives no logits")
        return self.distillation_loss(own, taught, labels, **options)

    def _router_loss(self, student: Features) -> Tensor | None:
        """How unevenly a mixture's experts are loaded, as the model says it; None: not asked."""
        found = output(student.outputs, "aux_loss") if self._router_weight is not None else None
        return found.to(self.args.device) if isinstance(found, Tensor) else None

    def _combined(self, model: nn.Module, values: dict[str, Tensor], share: Tensor) -> Tensor:
        """The weighted sum; under ``gradient_norm`` the factors are measured first, if due."""
        assert self.terms is not None
        due = self._starts_update and self.state.global_step % self.args.balance_steps == 0
        if self.args.balance == "gradient_norm" and model.training and due:
            trained = [p for p in self._student_parameters() if p.requires_grad]
            norms = self.terms.gradient_norms(values, trained)
            self.terms.rebalance(self.accelerator.reduce(norms, reduction="mean"))
        self._starts_update = False
        return self.terms.total(values, self.progress, share)

    def _student_parameters(self) -> list[nn.Parameter]:
        own = {id(parameter) for parameter in self.terms.parameters()} if self.terms else set()
        return [p for p in self.model.parameters() if id(p) not in own]

    def _get_num_items_in_batch(
        self, batch_samples: list, device: torch.device
    ) -> Tensor | int | None:
        """The base class's number of predicted tokens; also counts what the terms divide by."""
        self._starts_update = True
        if self.terms is not None:
            counts = [Counts.of(_token_mask(batch)) for batch in batch_samples]
            total = torch.stack([torch.stack(c) for c in counts]).sum(0).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = self.accelerator.reduce(total, reduction="sum")
            self._update = Counts(*total.unbind())
        if self.task.labels is None and self._update is not None:
            return self._update.positions
        if self.task.labels is not None:
            labels = (self._take_labels(batch)[0].labels for batch in batch_samples)
            batch_samples = [
                {**batch, "labels": own} for batch, own in zip(batch_samples, labels, strict=True)
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _take_labels(
        self, inputs: Mapping[str, Any], needed: bool = True
    ) -> tuple[Targets, dict[str, Any]]:
        """What is to be predicted, and everything else; ValueError if it is ``needed`` and missing.

        A loss of the teacher alone (alpha 1) needs to know only which predictions count: without
        labels those of all tokens that are no padding.
        """
        others = {k: v for k, v in inputs.items() if k != "labels"}
        if self.task.labels is None or inputs.get("labels") is not None:
            return Targets(inputs.get("labels") if self.task.labels else None, True), others
        if needed and self._alpha.lowest < 1:
            raise ValueError(
                f"labels: missing in the batch (it has {', '.join(inputs)}); distillation needs "
                "them, with -100 where nothing is to be learnt, unless alpha is 1"
            )
        mask = _token_mask(inputs)
        if self.task is CAUSAL_LM:  # the text is its own label
            return Targets(inputs["input_ids"].masked_fill(~mask, -100), True), others
        zeros = torch.zeros_like(inputs["input_ids"]).masked_fill(~mask, -100)
        return Targets(
            zeros.new_zeros(len(zeros)) if self.task is SEQUENCE else zeros, False
        ), others

    def _counted(self, labels: Tensor) -> Tensor:
        """How many labels are predicted."""
        return (labels[..., 1:] if self.task.shift else labels).ne(-100).sum()

    # ---- what is logged ------------------------------------------------------------------------

    def _parts(self, parts: KDLossOutput, targets: Targets) -> dict[str, Tensor]:
        """The logged parts, each as a sum over tokens divided by the denominator of ``parts``.

        ``agreement`` and ``accuracy`` come as shares of this batch's tokens and are turned into
        numbers of tokens. What labels that nobody gave would say is left out.
        """
        assert targets.labels is not None
        assert parts.ce_loss is not None and parts.accuracy is not None  # there are labels
        tokens = self._counted(targets.labels)
        named: dict[str, Tensor] = {}
        if targets.known:
            named |= {"ce_loss": parts.ce_loss, "accuracy": parts.accuracy * tokens}
        if self._response_has_teacher:
            named |= {"kd_loss": parts.kd_loss, "agreement": parts.agreement * tokens}
        return named

    def _observe_step(
        self,
        parts: KDLossOutput | None,
        targets: Targets,
        num_items: Tensor | int | None,
        scale: int,
        values: dict[str, Tensor],
    ) -> None:
        named = {f"{name}_loss": value.detach() for name, value in values.items()}
        labels = targets.labels
        if parts is not None and labels is not None:
            named |= self._parts(parts, targets)
            denominator = torch.as_tensor(
                self._counted(labels) if num_items is None else num_items
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
            logs |= self._scheduled()
        super().log(logs, start_time)

    def _scheduled(self) -> dict[str, float]:
        """What changes during training: its values at the update just made."""
        progress = max(0, self.state.global_step - 1) / max(1, self.state.max_steps - 1)
        settings = {"alpha": self._alpha, "temperature": self._temperature}
        changing = {n: s.at(progress) for n, s in settings.items() if s.kind != "constant"}
        return changing if self.terms is None else changing | self.terms.state_to_log(progress)

    # ---- data ----------------------------------------------------------------------------------

    def _fill_teacher(self) -> None:
        """Let a teacher that is asked for every example be asked, if it is needed."""
        if self._response_has_teacher:
            self._teacher.fill(self._examples())

    def _examples(self) -> Iterator[dict[str, Any]]:
        """Every example of the data sets."""
        given = (self.train_dataset, self.eval_dataset)
        for data in itertools.chain(*(d.values() if isinstance(d, dict) else [d] for d in given)):
            sized: Any = () if data is None else data
            yield from (sized[i] for i in range(len(sized))) if hasattr(sized, "__len__") else sized

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that are kept: what either model's forward takes."""
        if self._signature_columns is not None:
            return
        super()._set_signature_columns_if_needed()
        first: list[str] = self._signature_columns or []
        signatures = (self._recorder.signature, self._teacher.signature)
        names = {name for signature in signatures if signature for name in signature.names}
        self._signature_columns = first + sorted(names.difference(first))

    @contextlib.contextmanager
    def _nothing_dropped(self) -> Iterator[None]:
        """``dataloader_drop_last`` is for updates of one size; an evaluation has all items."""
        kept = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = kept

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with self._nothing_dropped():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with self._nothing_dropped():
            return super().get_test_dataloader(*args, **kwargs)

    # ---- evaluation ----------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor | None, Tensor | None]:
        """Adds one batch to the token-weighted sums, from which the losses are computed."""
        inputs = self._prepare_inputs(inputs)
        given = inputs.get("labels") if self.task.labels is not None else None
        targets, inputs = self._take_labels(inputs, needed=False)
        labels, mask = targets.labels, _token_mask(inputs)
        real = self._real_examples(len(mask), mask.device)
        counted = None
        if labels is not None:
            counted = labels.masked_fill(~real.view(-1, *[1] * (labels.ndim - 1)), -100)
        with torch.no_grad(), self.compute_loss_context_manager():
            student = self.student_features(model, inputs, with_logits=not prediction_loss_only)
            teacher = self.teacher_features(inputs)
            sums = self._response(student, teacher, counted, num_items=1, label_smoothing=0.0)
            if self.terms is not None and teacher is not None:
                self._evaluate_terms(student, teacher, mask & real[:, None])
        if sums is not None and counted is not None:
            self._evaluate_response(sums, targets._replace(labels=counted), student)
        if prediction_loss_only:
            return (None, None, None)
        first = student.outputs[0] if student.logits is None else student.logits
        return (None, first, given)

    def _evaluate_response(self, sums: KDLossOutput, targets: Targets, student: Features) -> None:
        assert targets.labels is not None
        tokens = self._counted(targets.labels)
        parts = self._parts(sums, targets)
        if targets.known or self.args.alpha == 1:
            parts |= {"loss": sums.loss.detach()}
        router = self._router_loss(student)
        if router is not None:
            parts |= {"aux_loss": router * tokens}
        self._evaluated.add(tokens=tokens, **parts)

    def _evaluate_terms(self, student: Features, teacher: Features, mask: Tensor) -> None:
        assert self.terms is not None
        one = torch.ones((), device=mask.device)
        values = self.terms(student, teacher, mask, Counts(one, one))
        counts = Counts.of(mask)._asdict()
        self._evaluated.add(**counts, **{f"{name}_loss": value for name, value in values.items()})

    def _real_examples(self, count: int, device: torch.device) -> Tensor:
        """Bool [count]: False for examples that only fill up the last batch of all processes."""
        state = self.accelerator.gradient_state
        if (
            self.accelerator.num_processes == 1
            or not state.end_of_dataloader
            or state.remainder < 1
        ):
            return torch.ones(count, dtype=torch.bool, device=device)
        first = self.accelerator.process_index * count
        return torch.arange(first, first + count, device=device) < state.remainder

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The base class's loop; losses and shares are means over all predicted tokens."""
        self._fill_teacher()
        self._evaluated = Sums()
        mark = "_is_accelerate_prepared"
        marked = hasattr(self.model, mark)
        output = super().evaluation_loop(*args, **kwargs)
        if not marked:
            # An evaluation before any training marks the model as prepared, and training would
            # then leave it without DistributedDataParallel: every process would train alone.
            vars(self.model).pop(mark, None)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._means(self._evaluated.take(self, "sum"))
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def metric_names(self) -> list[str]:
        """What an evaluation measures, without the prefix ``eval_``."""
        names = ["loss"]
        if self.task.labels is not None:
            names += ["ce_loss", "accuracy"]
            names += ["kd_loss", "agreement"] if self._response_has_teacher else []
            names += [] if self.task in (SEQUENCE, TOKEN) else ["perplexity"]
        return names + [f"{name}_loss" for name in self._weights if name != "response"]

    def _means(self, sums: dict[str, float]) -> dict[str, float]:
        """Every sum over its own denominator; ``loss`` is of all terms, at end weights."""
        counts = {name: sums.pop(name, 0.0) for name in ("tokens", "positions", "examples")}
        denominators = {name: max(count, 1.0) for name, count in counts.items()}
        weights = self._weights
        kinds = {f"{n}_loss": "examples" if n in EXAMPLE_TERMS else "positions" for n in weights}
        means = {n: value / denominators[kinds.get(n, "tokens")] for n, value in sums.items()}
        if "loss" in means or (means and self.task.labels is None):
            response = weights["response"].end * means["loss"] if "loss" in means else 0.0
            beside = [name for name in weights if f"{name}_loss" in means]
            means["loss"] = response + sum(weights[n].end * means[f"{n}_loss"] for n in beside)
            means["loss"] += (self._router_weight or 0.0) * means.get("aux_loss", 0.0)
        if "ce_loss" in means and self.task not in (SEQUENCE, TOKEN):
            means["perplexity"] = _exp(means["ce_loss"])
        return means

    # ---- what the terms learn ------------------------------------------------------------------

    @contextlib.contextmanager
    def _attached_terms(self, attached: bool) -> Iterator[None]:
        """The terms' parameters as a part of the student, for the optimizer and DDP, or not.

        They are attached while training only, and taken off to save or load the student.
        """
        modules = self.model._modules
        before = modules.get(_TERMS_NAME)
        if self.terms is not None and attached:
            modules[_TERMS_NAME] = self.terms
        else:
            modules.pop(_TERMS_NAME, None)
        try:
            yield
        finally:
            modules.pop(_TERMS_NAME, None)
            if before is not None:
                modules[_TERMS_NAME] = before

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_if_new()
        self._start_over()
        self._fill_teacher()
        self._say_heads()
        if self.terms is None:
            return super()._inner_training_loop(*args, **kwargs)
        # DistributedDataParallel takes parameters that its own forward does not use for unused.
        # Their gradients are averaged in training_step; they start equal in every process, since
        # the base class's constructor seeds right before they are made.
        names = [f"{_TERMS_NAME}.{name}" for name in self.terms.state_dict()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self.model, names
        )
        with self._attached_terms(True):
            return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        several = self.accelerator.num_processes > 1 and self.accelerator.sync_gradients
        if self.terms is not None and several:
            for parameter in self.terms.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return loss

    # ---- checkpoints ---------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """The base class's training, which goes on from a whole checkpoint or not at all."""
        given: str | None = None
        if resume_from_checkpoint is True:
            given = str(self.newest_checkpoint(required=True))
        elif resume_from_checkpoint:
            given = str(resume_from_checkpoint)
            reason = checkpoints.damage(Path(given), *self.checkpoint_files())
            if reason is not None:
                raise ValueError(f"resume_from_checkpoint: {given!r}: {reason}")
        return super().train(given, *args, **kwargs)

    def newest_checkpoint(self, required: bool = False) -> Path | None:
        """The newest whole checkpoint in ``output_dir``; newer ones are told of in the log.

        ValueError if there is none and one is ``required``.
        """
        folder = Path(str(self.args.output_dir))
        newest, damaged = checkpoints.newest_whole(folder, *self.checkpoint_files())
        told = "; ".join(damaged)
        if newest is None and required:
            why = f" ({told})" if damaged else ""
            raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {str(folder)!r}{why}")
        if damaged and self.is_world_process_zero():
            start = "the beginning" if newest is None else newest.name
            logger.warning(f"{folder}: training goes on from {start}; {told}")
        return newest

    def checkpoint_files(self) -> tuple[list[str], bool]:
        """What a checkpoint of this training holds, as :func:`checkpoints.damage` takes it."""
        needed = checkpoints.rng_files(self.args.world_size)
        # DeepSpeed and FSDP have formats of their own for weights and optimizer.
        if self.is_deepspeed_enabled:
            return needed, False
        needed.append(checkpoints.SCHEDULER_FILE)
        if not self.is_fsdp_enabled:
            needed.append(checkpoints.OPTIMIZER_FILE)
        if getattr(self.accelerator, "scaler", None) is not None:
            needed.append(checkpoints.SCALER_FILE)
        if self.terms is not None:
            needed.append(TERMS_FILE)
        return needed, not self.is_fsdp_enabled

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The base class's checkpoint, of finite weights and in JSON that every parser reads."""
        name = not_finite(self.model)
        # A process may hold a part of the weights: all of them stop, or none.
        bad = torch.tensor(float(name is not None), device=self.args.device)
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        if bad > 0:
            raise FloatingPointError(
                f"step {self.state.global_step}: {name or 'a weight of another process'} is not "
                "finite; no checkpoint is written of it"
            )
        state = self.state
        history, best = state.log_history, state.best_metric
        state.log_history, state.best_metric = plain(history), plain(best)
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            state.log_history, state.best_metric = history, best

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The student alone, and what the terms have learnt in a file of its own."""
        if state_dict is not None:
            prefix = f"{_TERMS_NAME}."
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(prefix)}
        with self._student_alone(), self._without_secrets():
            super()._save(output_dir, state_dict)
        if self.terms is not None and self.args.should_save:
            folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
            save_file(self.terms.state_dict(), folder / TERMS_FILE)

    @contextlib.contextmanager
    def _student_alone(self) -> Iterator[None]:
        """Without the terms, and out of ``torch.compile`` or ``nn.DataParallel``.

        Either puts a word before the name of each weight: under such names nothing else reads the
        files, and PEFT does not find what it has to save.
        """
        with self._attached_terms(False):
            given = self.model
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                self.model = self.accelerator.unwrap_model(given, keep_torch_compile=False)
            try:
                yield
            finally:
                self.model = given

    @contextlib.contextmanager
    def _without_secrets(self) -> Iterator[None]:
        """The arguments as they are pickled beside the weights, which may be published."""
        given = self.args
        self.args = copy.copy(given)
        for name in vars(given):
            if is_secret(name):
                setattr(self.args, name, None)
        try:
            yield
        finally:
            self.args = given

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuses to go on from a checkpoint that lacks weights: they would stay as they are."""
        if not self._resumes:
            super()._issue_warnings_after_load(load_result)
            return
        tensors = self.model.state_dict(keep_vars=True)
        missing = [name for name in load_result.missing_keys if name in tensors]
        loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
        lacking = [name for name in missing if id(tensors[name]) not in loaded]  # else: tied
        if lacking:
            raise ValueError(
                f"resume_from_checkpoint: the checkpoint lacks {len(lacking)} weights of the "
                f"student ({', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''})"
            )

    def _load_terms(self, folder: str) -> None:
        if self.terms is not None and (Path(folder) / TERMS_FILE).exists():
            self.terms.load_state_dict(load_file(Path(folder) / TERMS_FILE))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._begin_if_new()
        self._resumes = True
        try:
            with self._student_alone():
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            self._resumes = False
        self._load_terms(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self._student_alone():
            super()._load_best_model()
        self._load_terms(str(self.state.best_model_checkpoint))


class Targets(NamedTuple):
    """What a batch is to be predicted as."""

    labels: Tensor | None  #: -100 where nothing is; None: the model has no head
    known: bool  #: False: nobody gave labels, and these only say which predictions count


def _narrowed(student: Tensor | Hidden, vocab: int) -> Tensor | Hidden:
    """The student's first ``vocab`` entries, all that a smaller teacher can say something of."""
    width = student.weight.shape[0] if isinstance(student, Hidden) else student.shape[-1]
    if width <= vocab:
        return student
    if not isinstance(student, Hidden):
        return student[..., :vocab]
    bias = None if student.bias is None else student.bias[:vocab]
    return student._replace(weight=student.weight[:vocab], bias=bias)


def _source(role: str, given: Tensor | Hidden | TopK) -> dict[str, Any]:
    """The arguments of a loss that say what a model gave."""
    if isinstance(given, TopK):
        return {
            f"{role}_ids": given.ids,
            f"{role}_log_probs": given.log_probs,
            "tail": given.tail,
            f"{role}_temperature": given.temperature,
        }
    if isinstance(given, Hidden):
        names = ("hidden", "weight", "bias")
        return {f"{role}_{name}": getattr(given, name) for name in names}
    return {f"{role}_logits": given}


def _token_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Bool [B, S]: the tokens of a batch that are no padding."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return mask.bool()
    tokens = inputs["input_ids"]
    return torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)


def _exp(value: float) -> float:
    """exp without OverflowError."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
