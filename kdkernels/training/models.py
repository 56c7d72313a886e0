"""Loading teachers, building students: folders, names, GGUF files, configurations, kept layers."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
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
from .layer_configs import layer_count, parts, shortened, text_config
from .saving import not_finite
from .tasks import CAUSAL_LM, ENCODER, SEQUENCE, TOKEN, Task, base_of, check_config


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
        model = self._model(dtype, task)
        bad = not_finite(model)
        if bad is not None:
            raise ValueError(f"{self.option}: {bad} of {self.name!r} holds NaN or infinite numbers")
        return model

    def _model(self, dtype: str, task: Task) -> PreTrainedModel:
        """The model as it is read; ValueError if a part of it is missing."""
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
    layer = model.get_output_embeddings()
    rows = getattr(layer, "out_features", None)  # a quantised layer's weight is packed
    if rows is None:
        weight = getattr(layer, "weight", None)
        rows = text_config(model.config).vocab_size if weight is None else weight.shape[0]
    return int(rows)


#: Names of the tables of absolute positions.
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe", "pos_embed")


def positions(model: PretrainedConfig | PreTrainedModel) -> int | None:
    """Tokens that an example may have; None if there is no limit.

    A configuration says how many positions there are, and tables of absolute positions have so many
    rows.
    """
    config = model if isinstance(model, PretrainedConfig) else model.config
    number = getattr(text_config(config), "max_position_embeddings", None)
    found = [number] if isinstance(number, int) and number > 0 else []
    if isinstance(model, PreTrainedModel):
        found += _table_lengths(model)
    return min(found, default=None)


def table_positions(model: PreTrainedModel) -> int | None:
    """Tokens that an example may have before a table of absolute positions ends; None: no table."""
    return min(_table_lengths(model), default=None)


def _table_lengths(model: PreTrainedModel) -> list[int]:
    """For each table of absolute positions, the tokens it has a row for.

    In a model of RoBERTa's family the first rows are not for tokens: positions are counted from
    behind the padding token's id.
    """
    lengths = []
    for name, module in _text_model(model).named_modules():
        table = getattr(module, "weight", None)
        if name.rpartition(".")[2] in _POSITIONS and table is not None and table.ndim == 2:
            padding = getattr(module, "padding_idx", None)
            unused = getattr(module, "offset", 0) if padding is None else padding + 1
            lengths.append(table.shape[0] - unused)
    return lengths


def output_width(model: PreTrainedModel, task: Task) -> int:
    """Entries in a row of the model's logits: a classifier's labels, else the vocabulary."""
    if task in (SEQUENCE, TOKEN):
        return int(model.config.num_labels or 0)
    return vocab_size(model)


def from_config(source: ModelSource, dtype: str, task: Task = CAUSAL_LM) -> PreTrainedModel:
    """A student with random weights from the configuration of ``source``."""
    config = source.config()
    check_config(task, config, source.option)
    return in_dtype(task.auto_class.from_config(config, dtype=torch.float32), dtype)


def in_dtype(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """``model`` itself, its weights in the dtype of this name; "auto": as they are.

    As ``from_pretrained`` would load them: what an architecture keeps in float32 stays, and so do
    buffers that are not saved (rounded frequencies of rotary embeddings are other positions).
    """
    if dtype == AUTO:
        return model
    wanted = DTYPES[dtype]
    wide = model._get_dtype_plan(wanted)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(next((wide[k] for k in wide if k in name), wanted))
    return model


def decoder_layers(model: PreTrainedModel, option: str = "student_layers") -> tuple[nn.Module, str]:
    """The module that owns the list of transformer layers, and the list's attribute name.

    Of a vision-language model: the layers of the text model.
    ValueError, naming ``option``, if no list has exactly ``num_hidden_layers`` modules.
    """
    count = layer_count(model.config, option)
    for module in _text_model(model).modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise ValueError(
        f"{option}: {type(model).__name__} has no list of {count} layers to choose from"
    )


def _text_model(model: PreTrainedModel) -> nn.Module:
    """The part of ``model`` that its text configuration describes."""
    kind = type(text_config(model.config))
    if kind is type(model.config):
        return model
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is kind:
            return module
    return model.get_decoder()


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
    """A model of only the given layers of ``teacher``, renumbered; nothing is shared.

    It is made from the configuration that will be saved with it, as its folder will be loaded, and
    gets the teacher's weights. Then it has to be the teacher without the other layers, in each
    property of a layer and in the outputs for some tokens: layers may depend on their number
    (dense ones among those with experts, windows, scales), and not every configuration can say so.

    Raises:
        ValueError: it is not; with the first difference.
    """
    owner, attribute = decoder_layers(teacher)
    try:
        if getattr(teacher.config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised; name the model that it was made from")
        student = _rebuilt(teacher, owner, attribute, layers)
        ours = getattr(*decoder_layers(student))
        _check_properties(ours, getattr(owner, attribute), layers)
        _check_outputs(student, teacher, layers)
    except ValueError as error:
        raise ValueError(
            f"student_layers: {','.join(map(str, layers))} of {describe(teacher)} would be another "
            f"model when it is loaded: {error}"
        ) from error
    return student.requires_grad_(True).train(teacher.training)


def _rebuilt(
    teacher: PreTrainedModel, owner: nn.Module, attribute: str, layers: Sequence[int]
) -> PreTrainedModel:
    """The model of the shortened configuration with the teacher's weights, all of them."""
    name = next(name for name, module in teacher.named_modules() if module is owner)
    prefix = f"{name}.{attribute}." if name else f"{attribute}."
    weights: dict[str, Tensor] = {}
    for key, tensor in teacher.state_dict().items():
        number, dot, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or not dot:
            weights[key] = tensor
        elif int(number) in layers:
            weights[f"{prefix}{layers.index(int(number))}.{rest}"] = tensor
    config = shortened(teacher.config, layers)
    options = {"attn_implementation": teacher.config._attn_implementation}
    try:
        with torch.random.fork_rng(devices=[]):  # the random weights are not kept
            student = type(teacher)._from_config(config, dtype=teacher.dtype, **options)
    except Exception as error:  # an architecture may fail at a configuration as it likes
        raise ValueError(f"no model of its configuration ({_in_short(error)})") from error
    ours = student.to(teacher.device).state_dict(keep_vars=True)
    for key in sorted(ours.keys() ^ weights.keys()):
        fate = "random, the teacher has none" if key in ours else "lost, the student has none"
        raise ValueError(f"{key} would be {fate} there")
    for key, tensor in ours.items():
        weight = _of_layers(weights[key].detach(), tensor.shape, layers)
        if weight.shape != tensor.shape:
            shapes = tuple(tensor.shape), tuple(weight.shape)
            raise ValueError(f"{key} would be {shapes[0]}, the teacher's is {shapes[1]}")
        tensor.data = weight.clone()
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _of_layers(weight: Tensor, shape: torch.Size, layers: Sequence[int]) -> Tensor:
    """The parts of these layers, if that is what makes a weight that holds all layers' fit.

    Gemma's embeddings of each layer are one matrix, one layer's columns after the other's.
    """
    unequal = [at for at, (a, b) in enumerate(zip(weight.shape, shape, strict=False)) if a != b]
    if weight.ndim != len(shape) or len(unequal) != 1 or shape[unequal[0]] % len(layers):
        return weight
    wide = shape[unequal[0]] // len(layers)  # of one layer
    if weight.shape[unequal[0]] % wide or weight.shape[unequal[0]] // wide <= max(layers):
        return weight
    pieces = weight.split(wide, dim=unequal[0])
    return torch.cat([pieces[i] for i in layers], dim=unequal[0])


def _in_short(error: Exception) -> str:
    """A library's error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


#: Names of integers that say where a layer is and not what it does.
_NUMBERS = re.compile(r"(^|_)(idx|index|id|num|number|layers|seed)$")


def _properties(module: nn.Module) -> dict[str, Any]:
    """What a module is beside its weights: scalars, and buffers that no file holds."""
    kinds = (bool, int, float, str, type(None))
    found = {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
    found = {n: v for n, v in found.items() if "cached" not in n and n != "training"}
    saved = module._non_persistent_buffers_set
    buffers = {n: b for n, b in module.named_buffers(recurse=False) if n in saved}
    return {"class": type(module).__name__} | found | buffers


def _check_properties(ours: nn.ModuleList, theirs: nn.ModuleList, layers: Sequence[int]) -> None:
    """ValueError unless each layer is what it was; outputs for a few tokens do not show windows."""
    for new, old in enumerate(layers):
        modules = dict(ours[new].named_modules())
        for name, module in theirs[old].named_modules():
            want = _properties(module)
            have = _properties(modules[name]) if name in modules else {}
            for key, value in want.items():
                if key not in have:
                    raise ValueError(f"layer {new} has no {name or 'layer'}.{key}")
                if not _same(have[key], value) and not (
                    isinstance(value, int) and _NUMBERS.search(key)
                ):
                    where = ".".join(part for part in (name, key) if part)
                    raise ValueError(
                        f"{where} of its layer {new} is {_shown(have[key])}, of the teacher's "
                        f"layer {old} {_shown(value)}"
                    )


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.shape != theirs.shape or torch.equal(ours, theirs)  # some grow with their input
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return False
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)  # a scale that was computed anew
    return ours == theirs


def _shown(value: Any) -> str:
    return "another tensor" if isinstance(value, Tensor) else repr(value)


def _check_outputs(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]
) -> None:
    """ValueError unless the student computes what the teacher does without the other layers."""
    ids = _probe(teacher)
    with without_layers(teacher, layers):
        theirs = _outputs(teacher, ids)
    ours = _outputs(student, ids)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"its outputs are {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}"
        )
    # The same operations on the same numbers: mostly the same bits, whatever the dtype.
    largest = float(theirs.nan_to_num(0.0, 0.0, 0.0).abs().max())
    tolerance = max(1e-5, 2 * torch.finfo(teacher.dtype).eps) * largest
    if not torch.allclose(ours, theirs, rtol=0.0, atol=tolerance, equal_nan=True):
        difference = float((ours - theirs).nan_to_num(0.0, 0.0, 0.0).abs().max())
        raise ValueError(
            f"its outputs differ by {difference:.3g} (the largest is {largest:.3g}) from those of "
            "the teacher without the other layers"
        )


def _probe(model: PreTrainedModel) -> Tensor:
    """Token ids [1, S] from all over the vocabulary, none of them special."""
    size = getattr(text_config(model.config), "vocab_size", None) or 64  # CANINE has characters
    special = {
        value
        for config in parts(model.config)
        for name, value in vars(config).items()
        if isinstance(value, int) and name.endswith(("token_id", "token_index"))
    }
    plain = torch.tensor([i for i in range(min(size, 4096)) if i not in special] or [0])
    length = min(24, len(plain), positions(model) or 24)
    ids = plain[torch.linspace(0, len(plain) - 1, length).long()]
    return ids[None].to(model.device)


@torch.no_grad()
def _outputs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits, or the last hidden states, of ids [1, S], in ``eval()``, in float32."""
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs = model(input_ids=ids, **without_cache(model))
        return outputs[0 if outputs.get("logits") is None else "logits"].float()
    except Exception as error:  # whatever a model does with a few tokens
        raise ValueError(f"it cannot be run on tokens alone ({_in_short(error)})") from error


def check_takes_tokens(model: PreTrainedModel, option: str) -> None:
    """ValueError, naming ``option``, for a model that also needs images, boxes or a language."""
    try:
        _outputs(model, _probe(model))
    except ValueError as error:
        raise ValueError(f"{option}: {describe(model)}: {error}") from error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While this is open, ``model`` is in ``eval()``; each module gets its own mode back.

    BigBird, too, whose attention a text of a few tokens turns into the full one for good.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    sparse: list[Any] = [m for m in modules if isinstance(m, PreTrainedModel)]
    sparse = [module for module in sparse if hasattr(module, "attention_type")]
    kinds = [module.attention_type for module in sparse]
    model.eval()
    try:
        yield
    finally:
        for bird, kind in zip(sparse, kinds, strict=True):
            if bird.attention_type != kind:
                bird.set_attention_type(kind)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def without_layers(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[None]:
    """While this is open, only these layers change the hidden states; the others pass them on."""

    def pass_on(_: nn.Module, args: tuple, options: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else options.get("hidden_states")
        several = isinstance(output, tuple | list)
        first = output[0] if several else output
        if not isinstance(hidden, Tensor) or getattr(first, "shape", None) != hidden.shape:
            raise ValueError(f"a layer of {describe(model)} does not give what it takes")
        return type(output)([hidden, *output[1:]]) if several else hidden

    layers = getattr(*decoder_layers(model))
    handles = [
        layer.register_forward_hook(pass_on, with_kwargs=True)
        for number, layer in enumerate(layers)
        if number not in kept
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    kept = list(range(layer_count(model.config, "model")))

    def loss(layers: list[int]) -> float:
        with without_layers(model, layers):
            logits = model(input_ids=blocks, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()

    while len(kept) > keep:
        losses = {drop: loss([i for i in kept if i != drop]) for drop in kept}
        worst = min(losses, key=losses.__getitem__)
        kept.remove(worst)
        report(f"{len(kept)} layers, loss {losses[worst]:.3f}: {','.join(map(str, kept))}")
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
    config = text_config(model.config)
    for name in ATTENTION_DROPOUTS:
        if getattr(config, name, None):
            return name, float(getattr(config, name))
    return "", 0.0


def set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Every dropout of the model, in its modules and in its config."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ATTENTION_DROPOUTS:  # Llama and others keep a number instead of a module
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
    for config in parts(model.config):
        for name, value in vars(config).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(config, name, probability)


def describe(model: nn.Module) -> str:
    """``'bert' (BertForMaskedLM)``, for messages; of the model in a wrapper."""
    model = base_of(model)
    return f"{model.config.model_type!r} ({type(model).__name__})"
