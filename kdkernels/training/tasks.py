"""What a model is for, and what follows: its class, its labels, whether they are shifted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto


@dataclass(frozen=True, eq=False)
class Task:
    """One kind of model that can be distilled.

    ``labels``: what one label belongs to, ``"token"``, ``"example"`` or nothing (``None``: a model
    without a head, which has no response term).
    """

    name: str
    auto_class: Any  #: the class whose ``from_pretrained`` loads such a model
    mapping: Any  #: configuration class -> model class
    names: Any  #: model type -> name of the model class
    labels: str | None
    shift: bool = False

    def model_names(self) -> set[str]:
        """Names of all classes of such models."""
        names: set[str] = set()
        for name in self.names.values():
            names |= {name} if isinstance(name, str) else set(name)
        return names


CAUSAL_LM = Task(
    "causal-lm",
    auto.AutoModelForCausalLM,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "token",
    shift=True,
)
MASKED_LM = Task(
    "masked-lm",
    auto.AutoModelForMaskedLM,
    auto.MODEL_FOR_MASKED_LM_MAPPING,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "token",
)
SEQUENCE = Task(
    "sequence-classification",
    auto.AutoModelForSequenceClassification,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "example",
)
TOKEN = Task(
    "token-classification",
    auto.AutoModelForTokenClassification,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "token",
)
ENCODER = Task("encoder", auto.AutoModel, auto.MODEL_MAPPING, auto.MODEL_MAPPING_NAMES, None)

TASKS = {task.name: task for task in (CAUSAL_LM, MASKED_LM, SEQUENCE, TOKEN, ENCODER)}


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model of transformers that ``model`` is, or is a wrapper of.

    Adapters (PEFT), ``torch.compile``, DistributedDataParallel and classes of a user's own hold it
    as a submodule. Kind, configuration, output layer and the names of the forward's arguments are
    asked of it; what is run is the wrapper. ValueError if it holds several.
    """
    inside = {id(module): module for module in _outermost(model)}
    if len(inside) > 1:
        kinds = ", ".join(type(module).__name__ for module in inside.values())
        raise ValueError(
            f"model: {type(model).__name__} holds {len(inside)} models ({kinds}); only one that is "
            "around a single model says what it is for"
        )
    # None: a class of the user's own, with a configuration.
    return next(iter(inside.values()), cast(PreTrainedModel, model))


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The models of transformers in ``module`` that are in no other one."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def task_of(model: nn.Module) -> Task:
    """The task that the class of ``model``, or one it derives from, is for; else a causal model.

    A class that is a causal as well as a masked language model (XLM) is what its config says.
    """
    model = base_of(model)
    decoder = getattr(model.config, "is_decoder", False)
    for name in (kind.__name__ for kind in type(model).__mro__):
        for task in (SEQUENCE, TOKEN, MASKED_LM, CAUSAL_LM, ENCODER):
            if name in task.model_names() and not (task is MASKED_LM and decoder):
                return task
    return CAUSAL_LM


def label_names(config: PretrainedConfig) -> list[str] | None:
    """A classifier's labels in the order of their ids; None if they are only numbered.

    Numbered are ``LABEL_0``, ``LABEL_1``, which transformers writes where nobody gave names, and
    ``0``, ``1``: they say no more than the ids themselves.
    """
    pairs = ((int(i), str(name)) for i, name in (config.id2label or {}).items())
    names = [name for _, name in sorted(pairs)]
    return None if numbered(names) else names


def numbered(names: list[str]) -> bool:
    """Whether these names of the ids 0, 1, ... are the ids again."""
    return all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(names))


def same_label(name: str) -> str:
    """What two spellings of one label have in common: no upper case, and no space around it."""
    return name.strip().casefold()


def other_label(ours: list[str] | None, theirs: list[str] | None) -> int | None:
    """The first id that two lists of names call differently; None: none, or names are not known."""
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    pairs = zip(ours, theirs, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if same_label(a) != same_label(b)), None)


def check_can_be_loaded(task: Task, config: PretrainedConfig, argument: str) -> None:
    """ValueError unless the task's class loads a folder that holds this configuration.

    Of some vision-language models it makes the text model, whose folder it then does not know.
    """
    if type(config) not in task.mapping and not hasattr(config, "auto_map"):
        raise ValueError(
            f"{argument}: {config.model_type!r} ({type(config).__name__}) can be saved, but "
            f"{task.auto_class.__name__} does not load such a folder"
        )


def check_config(task: Task, config: PretrainedConfig, argument: str) -> None:
    """ValueError unless a model with this configuration can be distilled for this task."""
    kind = f"{config.model_type!r} ({type(config).__name__})"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{argument}: {kind} is an encoder-decoder; those cannot be distilled")
    if task is CAUSAL_LM:
        decoder = getattr(config, "is_decoder", False)
        if type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not decoder:
            raise ValueError(
                f"{argument}: {kind} is not a decoder-only causal language model; name its task "
                f"({', '.join(name for name in TASKS if name != task.name)})"
            )
    elif type(config) not in task.mapping:
        raise ValueError(f"{argument}: {kind} has no model for the task {task.name}")
    if task is SEQUENCE:
        labels, problem = config.num_labels, getattr(config, "problem_type", None)
        if labels == 1 or problem in ("regression", "multi_label_classification"):
            raise ValueError(
                f"{argument}: {kind} has {labels} label(s), problem_type {problem!r}; only "
                "classifiers with one label an example can be distilled"
            )
