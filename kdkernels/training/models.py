"""Loading teachers, building students: folders, names, GGUF files, configurations, kept layers."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..dtypes import AUTO, DTYPES
from .tasks import CAUSAL_LM, ENCODER, SEQUENCE, TOKEN, Task, check_config


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a folder, a hub name, a GGUF file, or a config's .json file.

    ``option`` is the command-line option that named it; every error starts with it.
    """

    option: str
    name: str

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix.lower() == ".gguf"

    def check(self) -> None:
        """Refuse what can be seen to be missing, without asking the hub."""
        if self.path.exists():
            if self.path.is_file() and self.path.suffix.lower() not in (".gguf", ".json"):
                raise ValueError(
                    f"{self.option}: {self.name!r} is neither a folder nor a .gguf file"
                )
            if self.path.is_dir() and not (self.path / "config.json").exists():
                raise ValueError(f"{self.option}: no config.json in folder {self.name!r}")
        elif self.is_gguf or self.name.startswith((".", "/", "~")) or self.name.count("/") > 1:
            raise ValueError(f"{self.option}: {self.name!r} does not exist")

    def _load(self, loader: Callable[..., Any], what: str, **options: Any) -> Any:
        self.check()
        location, options = (str(self.path) if self.path.exists() else self.name), dict(options)
        if self.is_gguf:
            location, options["gguf_file"] = str(self.path.parent), self.path.name
        if self.path.exists():
            options["local_files_only"] = True
        try:
            return loader(location, **options)
        except Exception as error:  # hub, network, format and pickle errors share no base class
            first_line = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{self.option}: cannot load the {what} of {self.name!r} "
                f"({type(error).__name__}: {first_line})"
            ) from error

    def config(self) -> PretrainedConfig:
        return self._load(AutoConfig.from_pretrained, "configuration")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load(AutoTokenizer.from_pretrained, "tokenizer")

    def model(self, dtype: str, task: Task = CAUSAL_LM) -> PreTrainedModel:
        """The model for ``task`` in ``dtype`` ("auto": as stored), on the CPU."""
        loader = task.auto_class.from_pretrained
        if self.is_gguf:
            return _without_gguf(self._load(loader, "model", dtype=dtype))
        if (self.path / "generation_config.json").exists():  # transformers passes a bad one over
            self._load(GenerationConfig.from_pretrained, "generation configuration")
        model, loading = self._load(loader, "model", dtype=dtype, output_loading_info=True)
        # What a file lacks starts at random. The pooler of an encoder is not used.
        lacking = sorted(name for name in loading["missing_keys"] if "pooler" not in name)
        if self.option == "student":  # may get a new head: a classifier's on a language model
            body = f"{model.base_model_prefix}."
            lacking = [name for name in lacking if name.startswith(body) or task is ENCODER]
        if lacking:
            raise ValueError(
                f"{self.option}: {self.name!r} lacks {len(lacking)} weights of a "
                f"{type(model).__name__} ({', '.join(lacking[:3])}"
                f"{', ...' if len(lacking) > 3 else ''}); they would be random numbers"
            )
        return model


def _without_gguf(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that can be saved: transformers refuses to save a GGUF one."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config)(**settings)
    rebuilt = type(model)._from_config(config, dtype=model.dtype)
    rebuilt.load_state_dict(model.state_dict())
    rebuilt.tie_weights()
    rebuilt.generation_config = model.generation_config
    return rebuilt


def tokenizer_difference(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, common: int | None = None
) -> str | None:
    """The first difference of two token -> id mappings in words, or None when they agree.

    ``common``: compare ids below it only (for ``vocab_policy="truncate"``).
    """
    limit = math.inf if common is None else common
    ours = {token: i for token, i in student.get_vocab().items() if i < limit}
    theirs = {token: i for token, i in teacher.get_vocab().items() if i < limit}
    if ours == theirs:
        return None
    token = min(
        (t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)),
        key=lambda t: (min(ours.get(t, math.inf), theirs.get(t, math.inf)), t),
    )
    return (
        f"token {token!r} is id {ours.get(token, 'missing')} in the student's tokenizer "
        f"({len(ours)} tokens) and {theirs.get(token, 'missing')} in the teacher's ({len(theirs)})"
    )


def vocab_size(model: PreTrainedModel) -> int:
    """Width of a language model's logits: rows of the output embedding, else of the config."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return int(model.config.vocab_size if weight is None else weight.shape[0])


def output_width(model: PreTrainedModel, task: Task) -> int:
    """Entries in a row of the model's logits: a classifier's labels, else the vocabulary."""
    if task in (SEQUENCE, TOKEN):
        return int(model.config.num_labels or 0)
    return vocab_size(model)


def from_config(source: ModelSource, dtype: str, task: Task = CAUSAL_LM) -> PreTrainedModel:
    """A student with random weights from the configuration of ``source``."""
    config = source.config()
    check_config(task, config, source.option)
    torch_dtype = torch.float32 if dtype == AUTO else DTYPES[dtype]
    return task.auto_class.from_config(config, dtype=torch_dtype)


def in_dtype(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """``model`` itself, its weights in the dtype of this name; "auto": as they are."""
    module: nn.Module = model  # transformers hides the signature of `to`
    if dtype != AUTO:
        module.to(DTYPES[dtype])
    return model


def decoder_layers(model: PreTrainedModel, option: str = "student_layers") -> tuple[nn.Module, str]:
    """The module that owns the list of transformer layers, and the list's attribute name.

    ValueError, naming ``option``, if no list has exactly ``num_hidden_layers`` modules.
    """
    count = model.config.num_hidden_layers
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise ValueError(
        f"{option}: {type(model).__name__} has no list of {count} layers to choose from"
    )


def parse_layers(text: str, available: int) -> list[int]:
    """``"0,1,5-7"`` -> [0, 1, 5, 6, 7]; strictly increasing, each below ``available``."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            ends = int(first), int(last if dash else first)
            if max(ends) >= available:  # before a range of any length is made
                raise IndexError(f"student_layers: {max(ends)} is outside 0..{available - 1}")
            layers.extend(range(ends[0], ends[1] + 1))
    except IndexError as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(f"student_layers: {text!r} is not a list such as 0,1,5-7") from error
    if layers != sorted(set(layers)) or not layers:
        raise ValueError(f"student_layers: {text!r} is not strictly increasing")
    return layers


def keep_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy of ``teacher`` that has only the given layers, renumbered; nothing is shared."""
    owner, attribute = decoder_layers(teacher)
    original = getattr(owner, attribute)
    try:  # Copy only what is kept.
        setattr(owner, attribute, nn.ModuleList(original[i] for i in layers))
        student = copy.deepcopy(teacher)
    finally:
        setattr(owner, attribute, original)
    config = student.config
    # Some architectures list a property of each layer (sliding or full attention) in their config.
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[i] for i in layers])
    config.num_hidden_layers = len(layers)
    student_owner, _ = decoder_layers(student)
    for position, layer in enumerate(getattr(student_owner, attribute)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    return student.requires_grad_(True)


@torch.no_grad()
def choose_layers(
    model: PreTrainedModel, blocks: Tensor, keep: int, report: Callable[[str], None] = print
) -> list[int]:
    """Greedy pruning: drop the layer whose removal raises the loss on ``blocks`` least, repeatedly.

    Args:
        blocks: int64 [N, S], text that is used for nothing but training.
        keep: how many layers stay.
    """
    model.eval()
    owner, attribute = decoder_layers(model)
    original, config = getattr(owner, attribute), model.config
    kept = list(range(len(original)))

    def loss(layers: list[int]) -> float:
        setattr(owner, attribute, nn.ModuleList(original[i] for i in layers))
        config.num_hidden_layers = len(layers)
        logits = model(input_ids=blocks, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()

    try:
        while len(kept) > keep:
            losses = {drop: loss([i for i in kept if i != drop]) for drop in kept}
            worst = min(losses, key=losses.__getitem__)
            kept.remove(worst)
            report(f"{len(kept)} layers, loss {losses[worst]:.3f}: {','.join(map(str, kept))}")
    finally:
        setattr(owner, attribute, original)
        config.num_hidden_layers = len(original)
    return kept


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, shared ones once: the size of the saved model but for its header."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """The option of the model's forward that keeps it from filling a cache for generation."""
    takes_it = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if takes_it else {}


#: Names under which architectures keep the probability of dropping attention in their config.
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


def attention_dropout(model: PreTrainedModel) -> tuple[str, float]:
    """The config's name and value of the attention dropout; ("", 0.0) if it has none."""
    for name in ATTENTION_DROPOUTS:
        if getattr(model.config, name, None):
            return name, float(getattr(model.config, name))
    return "", 0.0


def set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Every dropout of the model, in its modules and in its config."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ATTENTION_DROPOUTS:  # Llama and others keep a number instead of a module
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
    for name, value in vars(model.config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(model.config, name, probability)


def describe(model: PreTrainedModel) -> str:
    """``'bert' (BertForMaskedLM)``, for messages."""
    return f"{model.config.model_type!r} ({type(model).__name__})"
