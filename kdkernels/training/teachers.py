"""Whom a student learns from: a model, a model's outputs on disk, or nobody but the labels.

Which of them it is, is asked where one is made; whoever holds a :class:`Teacher` does not ask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .arguments import DistillationArguments
from .model_losses import router_weight
from .models import (
    describe,
    in_dtype,
    output_width,
    parameter_count,
    tokenizer_difference,
    vocab_size,
    without_cache,
)
from .output_layer import Head
from .recorder import Features, Needs, Recorder, Signature
from .schedules import Schedule
from .tasks import (
    SEQUENCE,
    TOKEN,
    Task,
    base_of,
    check_config,
    label_names,
    other_label,
    same_label,
    task_of,
)
from .teacher_cache import TeacherCache
from .terms import INSIDE_LAYERS, DistillationTerms, layer_pairs


class Student(NamedTuple):
    """A student, as far as a teacher has to know it."""

    model: PreTrainedModel  #: itself, where a wrapper of it is trained
    trained: nn.Module  #: the model, or that wrapper
    parameters: frozenset[int]  #: their identities, the wrapper's own among them
    task: Task
    args: DistillationArguments
    weights: dict[str, Schedule]  #: of all terms
    router_weight: float | None  #: of the loss that its experts' loads add to the terms
    temperatures: set[float]  #: the ends of those that it is taught at
    divergences: set[str]  #: the keys of those that it is taught by
    tokenizer: Any  #: whatever prepares its data; compared if it is a tokenizer

    @classmethod
    def of(
        cls, model: nn.Module, task: Task, args: DistillationArguments, tokenizer: Any = None
    ) -> Student:
        """The student that is taught as ``args`` say; ValueError if they do not fit its task."""
        own = frozenset(map(id, model.parameters()))
        ends = args.temperature_over_time()
        weights = args.resolved_terms(task.labels is not None)
        student = cls(
            base_of(model),
            model,
            own,
            task,
            args,
            weights,
            router_weight=router_weight(model),
            temperatures={ends.lowest, ends.highest},
            divergences={args.resolved_divergence().key},
            tokenizer=tokenizer,
        )
        student._check_checkpointing()
        return student

    def _check_checkpointing(self) -> None:
        """ValueError if something needs a gradient inside of reentrantly checkpointed layers.

        Their forward runs without a graph: what is seen inside of them has no gradient, and nobody
        says so.
        """
        if not _checkpoints_reentrantly(self.model, self.args):
            return
        inside = [f"terms: {name}" for name in INSIDE_LAYERS if name in self.weights]
        inside += ["output_router_logits"] if self.router_weight else []
        inside += ["balance: gradient_norm"] if self.args.balance == "gradient_norm" else []
        if inside:
            raise ValueError(
                f"gradient_checkpointing_kwargs: use_reentrant=True leaves {', '.join(inside)} "
                "without a gradient; give use_reentrant=False"
            )

    @property
    def beside_response(self) -> list[str]:
        """The terms that look at more than the teacher's outputs."""
        return [name for name in self.weights if name != "response"]


class Teacher(ABC):
    """What a run has of its teacher."""

    model: PreTrainedModel | None = None  #: whose layers can be looked at
    cache: TeacherCache | None = None
    signature: Signature | None = None  #: what its forward takes; None: it is not run

    @abstractmethod
    def __str__(self) -> str:
        """How the command line calls it."""

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The model by its role, for what goes through all models of a run."""
        return {} if self.model is None else {"teacher": self.model}

    @property
    def dtype(self) -> torch.dtype | None:
        """In which it is run; None: it is not."""
        return None

    @property
    @abstractmethod
    def parameters(self) -> int | None:
        """How many it has; None: that is not known."""

    @abstractmethod
    def width(self, task: Task) -> int:
        """Entries in a row of its logits."""

    @abstractmethod
    def check(self, student: Student) -> None:
        """ValueError unless this student can learn from it."""

    @abstractmethod
    def features(
        self, inputs: dict[str, Any], device: torch.device, head: Head | None
    ) -> Features | None:
        """What it says about a batch, on ``device``; None: nothing.

        ``head``: the output layer that a model leaves out.
        """

    def check_run(self, student: Student, examples: Iterable[dict[str, Any]]) -> None:
        """:meth:`check`, and ValueError for what would otherwise stop a run that has begun."""
        self.check(student)

    def reach(self, examples: Iterable[dict[str, Any]]) -> None:
        """Get in touch with whoever answers for it; ValueError or RuntimeError if that fails."""
        if self.cache is not None:
            self.cache.reach(examples)

    def fill(self, examples: Iterable[dict[str, Any]]) -> None:
        """Get all that it has to know of these examples, if it is not there."""
        if self.cache is not None:
            self.cache.fill(examples)

    def begin(self, student: Student) -> DistillationTerms | None:
        """Get ready to teach; what the terms beside the response learn, None if there are none."""
        return None


class ModelTeacher(Teacher):
    """A model: has everything, and is run for every batch.

    Args:
        model: is moved and switched to ``eval()`` in place by :meth:`begin`.
        tokenizer: its own, to be compared with the student's; None: not compared.
    """

    model: PreTrainedModel

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._recorder = Recorder(model, Needs(), "teacher")
        self._options = without_cache(self._base) if self.signature.takes("use_cache") else {}

    def __str__(self) -> str:
        return f"teacher {self.parameters / 1e6:.1f} M"

    @property
    def _base(self) -> PreTrainedModel:
        return base_of(self.model)

    @property
    def signature(self) -> Signature:  # type: ignore[override]
        return self._recorder.signature

    @property
    def dtype(self) -> torch.dtype:
        return self._base.dtype

    @property
    def parameters(self) -> int:
        return parameter_count(self.model)

    def width(self, task: Task) -> int:
        return output_width(self._base, task)

    def check(self, student: Student) -> None:
        _check_no_tail(student.args)
        task = task_of(self.model)
        if task is not student.task:
            raise ValueError(
                f"teacher: {describe(self.model)} is for {task.name}, model: "
                f"{describe(student.model)} for {student.task.name}; both must be for one task"
            )
        check_config(task, self._base.config, "teacher")
        if any(id(parameter) in student.parameters for parameter in self.model.parameters()):
            raise ValueError("teacher: it shares parameters with the student; pass a deep copy")
        if task in (SEQUENCE, TOKEN):
            check_labels(student.model.config, label_names(self._base.config))
        common = None if task.labels is None else _common_prefix(student, self.width(task))
        if self.tokenizer is not None and isinstance(student.tokenizer, PreTrainedTokenizerBase):
            difference = tokenizer_difference(student.tokenizer, self.tokenizer, common)
            if difference is not None:
                raise ValueError(f"teacher_processing_class: tokenizers differ: {difference}")

    def check_run(self, student: Student, examples: Iterable[dict[str, Any]]) -> None:
        self.check(student)
        self._terms(student)  # refuses what the models lack
        if student.args.layer_map != "uniform":
            # Refused even where no term looks at it.
            layer_pairs(student.args, student.model, self._base)

    def place(self, args: DistillationArguments) -> None:
        """Move the model, in place, to where it is run."""
        module: nn.Module = in_dtype(self.model, args.teacher_dtype)
        if args.teacher_device is not None:
            module.to(args.teacher_device)
        elif getattr(self._base, "hf_device_map", None) is None:
            module.to(args.device)

    def begin(self, student: Student) -> DistillationTerms | None:
        self.model.requires_grad_(False).eval()
        self.place(student.args)
        terms = self._terms(student)
        if terms is not None:
            self._recorder = terms.teacher
        return terms

    def _terms(self, student: Student) -> DistillationTerms | None:
        if not student.beside_response:
            return None
        return DistillationTerms(student.args, student.trained, self.model, student.weights)

    @torch.no_grad()
    def features(self, inputs: dict[str, Any], device: torch.device, head: Head | None) -> Features:
        own = next(self.model.parameters()).device
        moved = {k: v.to(own) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return self._recorder.run(self.model, moved, head, **self._options).to(device)


class CachedTeacher(Teacher):
    """A model's outputs on disk: has these, and only for the examples that were written."""

    cache: TeacherCache

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self._tail = cache.tail(None)
        self._common: int | None = None

    def __str__(self) -> str:
        return "teacher from its cache"

    @property
    def parameters(self) -> int | None:
        return self.cache.info.parameters

    def width(self, task: Task) -> int:
        return self.cache.info.vocab

    def _check_cache(self, student: Student) -> None:
        self.cache.check(
            student.task,
            student.beside_response,
            student.temperatures,
            student.divergences,
            student.args.cache_tail,
        )

    def check(self, student: Student) -> None:
        self._check_cache(student)
        if student.task in (SEQUENCE, TOKEN):
            check_labels(student.model.config, self.cache.info.labels)
        _common_prefix(student, self.cache.info.vocab)

    def check_run(self, student: Student, examples: Iterable[dict[str, Any]]) -> None:
        self._check_cache(student)
        if student.task is SEQUENCE:
            ours, theirs = student.model.config.num_labels, self.cache.info.vocab
            if ours != theirs:
                raise ValueError(f"student: {ours} labels, the cache has {theirs}")
        self.cache.require(examples)

    def begin(self, student: Student) -> None:
        self._tail = self.cache.tail(student.args.cache_tail)
        self._common = _common_prefix(student, self.cache.info.vocab)

    def features(self, inputs: dict[str, Any], device: torch.device, head: Head | None) -> Features:
        if self.cache.info.is_full:
            return Features(None, logits=self.cache.logits(inputs).to(device))
        entries = self.cache.entries(inputs, device, self._common)
        entries = entries._replace(tail=self._tail, temperature=self.cache.info.temperature)
        return Features(None, entries=entries)


class NoTeacher(Teacher):
    """Nobody: for a student of the labels alone."""

    def __str__(self) -> str:
        return "no teacher"

    @property
    def parameters(self) -> int:
        return 0

    def width(self, task: Task) -> int:
        return 0

    def check(self, student: Student) -> None:
        _check_no_tail(student.args)
        if student.beside_response:
            raise ValueError(
                f"teacher: None, but terms: {', '.join(student.beside_response)} need one"
            )
        if student.args.alpha_over_time().highest > 0:
            raise ValueError(
                f"teacher: None, but alpha = {student.args.alpha} needs one (alpha=0 does not)"
            )

    def features(self, inputs: dict[str, Any], device: torch.device, head: Head | None) -> None:
        return None


def _check_no_tail(args: DistillationArguments) -> None:
    if args.cache_tail is not None:
        raise ValueError(
            f"cache_tail: {args.cache_tail!r} has no effect; it needs a teacher_cache of few "
            "entries of a row"
        )


def _checkpoints_reentrantly(model: PreTrainedModel, args: DistillationArguments) -> bool:
    """Whether layers are checkpointed so, by the arguments or by the model as it is."""
    if args.gradient_checkpointing:
        given = args.gradient_checkpointing_kwargs
        return isinstance(given, dict) and bool(given.get("use_reentrant"))
    functions = (
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )
    return any(getattr(f, "keywords", {}).get("use_reentrant") for f in functions)


def check_columns(student: PretrainedConfig, data: Any, argument: str) -> None:
    """ValueError if a column of labels numbers them in another order than the student.

    Only names that both know can tell: a column may have names of its own for the same labels.
    """
    ours = label_names(student) or []
    for column, feature in (getattr(data, "features", None) or {}).items():
        names = getattr(getattr(feature, "feature", feature), "names", None)
        for i, name in enumerate(names or [] if column in ("label", "labels") else []):
            alike = [j for j, own in enumerate(ours) if same_label(own) == same_label(name)]
            if alike and i not in alike:
                raise ValueError(
                    f"{argument}: column {column!r} has label {i} for {name!r}, which is the "
                    f"student's label {alike[0]}; both must number them alike"
                )


def check_labels(student: PretrainedConfig, names: list[str] | None) -> None:
    """ValueError if a student's labels have other names, or another order, than its teacher's."""
    ours = label_names(student)
    other = other_label(ours, names)
    if other is not None and ours is not None and names is not None:
        raise ValueError(
            f"teacher: its label {other} is {names[other]!r}, the student's {ours[other]!r}; both "
            "must have the same names in the same order (id2label and label2id)"
        )


def teacher_of(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    cache: TeacherCache | None,
) -> Teacher:
    """The teacher that these arguments of ``DistillationTrainer`` name; ValueError if two."""
    if model is not None and cache is not None:
        raise ValueError("teacher_cache: give a teacher or its cache, not both")
    if model is not None:
        return ModelTeacher(model, tokenizer)
    return NoTeacher() if cache is None else CachedTeacher(cache)


def _common_prefix(student: Student, theirs: int) -> int | None:
    """The length of the vocabularies' common prefix; None where all of them is compared.

    ValueError unless logits of width ``theirs`` can teach the student.
    """
    if student.task in (SEQUENCE, TOKEN):
        if student.model.config.num_labels != theirs:
            raise ValueError(
                f"teacher: {theirs} labels, the student has {student.model.config.num_labels}"
            )
        return None
    ours = vocab_size(student.model)
    if ours == theirs:
        return None
    if student.args.vocab_policy == "error":
        raise ValueError(
            f"teacher: vocabulary of {theirs}, the student's has {ours}; they must be equal, "
            "or vocab_policy='truncate'"
        )
    return min(ours, theirs)
