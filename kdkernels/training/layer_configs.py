"""The configuration of a model that keeps some layers of another one.

Architectures say in many ways what each of their layers is: a list with an entry a layer, a list of
layers, how many layers come first, every how many. What is known of them is rewritten here for the
layers that stay. That the result is right is not decided here: ``models.keep_layers`` compares the
model that it makes with the one that it is taken from.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

#: Lists whose length may be the number of layers by chance, but which have no entry a layer.
_NOT_OF_LAYERS = re.compile(r"token|architectures|limit|section|label|languages|tasks")
#: Names of lists that hold layers' numbers if they are ascending; ``no_rope_layers`` holds flags.
_OF_NUMBERS = re.compile(r"^(?!no_rope_layers$).*(layer|idx|indices|indexes)")
#: How many layers come first that are unlike the others.
_FIRST = ("first_k_dense_replace", "num_dense_layers", "n_dense_layers")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """What describes the text model: ``config`` itself, or a part of a vision-language model's."""
    return config.get_text_config()


def parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """``config`` and all configurations within it: of text, of vision."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts(value)


def layer_count(config: PretrainedConfig, option: str) -> int:
    """Layers of the text model; ValueError, naming ``option``, if its configuration has none."""
    count = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ValueError(
            f"{option}: the configuration of a {config.model_type!r} does not say how many layers "
            "it has (num_hidden_layers)"
        )
    return count


def shortened(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """``config`` for these layers only, as its file will be read.

    Raises:
        ValueError: its class refuses the rewritten values, or does not keep them.
    """
    settings = json.loads(config.to_json_string(use_diff=False))
    text = text_config(config)
    part = settings
    for name in _path(config, text) or ():
        part = part[name]
    kept = _Kept(part, list(layers), text.num_hidden_layers)
    for repair in _REPAIRS:
        repair(kept)
    kept.set(type(text).attribute_map.get("num_hidden_layers", "num_hidden_layers"), len(layers))
    try:
        made = _read_again(type(config), json.dumps(settings))
        made = _read_again(type(config), made.to_json_string())
    except Exception as error:  # a class may check its values as it likes
        reason = " ".join(str(error).split())
        raise ValueError(f"its configuration cannot say so ({reason})") from error
    for key in kept.rewritten:
        if getattr(text_config(made), key, None) != part[key]:
            raise ValueError(f"its configuration does not keep {key} = {part[key]}")
    return made


def _read_again(kind: type[PretrainedConfig], text: str) -> PretrainedConfig:
    """The configuration that a folder's config.json with this text gives."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        return kind.from_pretrained(folder)


def _path(config: PretrainedConfig, wanted: PretrainedConfig) -> list[str] | None:
    """The names that lead from ``config`` to the configuration ``wanted`` within it."""
    if config is wanted:
        return []
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            path = _path(value, wanted)
            if path is not None:
                return [name, *path]
    return None


@dataclass
class _Kept:
    """A configuration's settings that are being rewritten for the layers that stay."""

    settings: dict[str, Any]
    layers: list[int]
    count: int  #: of all layers

    def __post_init__(self) -> None:
        self.rewritten: list[str] = []

    def has(self, *names: str) -> bool:
        """Whether all of these are set."""
        return all(self.settings.get(name) is not None for name in names)

    def set(self, name: str, value: Any) -> None:
        self.settings[name] = value
        self.rewritten.append(name)

    def positions(self, chosen: Container[int]) -> list[int]:
        """New numbers of the layers whose old number is among ``chosen``."""
        return [new for new, old in enumerate(self.layers) if old in chosen]


def _lists(kept: _Kept) -> None:
    """Entries of the layers that stay, and new numbers of layers."""
    for name, value in list(kept.settings.items()):
        if not isinstance(value, list) or not value or name in kept.rewritten:
            continue
        if _NOT_OF_LAYERS.search(name):
            continue
        numbers = all(type(entry) is int for entry in value) and value == sorted(set(value))
        if numbers and set(value) <= set(range(kept.count)) and _OF_NUMBERS.search(name):
            kept.set(name, kept.positions(value))
        elif len(value) == kept.count:
            kept.set(name, [value[i] for i in kept.layers])


def _by_layer(kept: _Kept) -> None:
    """Dictionaries whose keys are numbers of layers."""
    for name, value in list(kept.settings.items()):
        if not isinstance(value, dict) or not value or _NOT_OF_LAYERS.search(name):
            continue
        if name.startswith("id2") or not all(str(key).isdigit() for key in value):
            continue
        entries = {int(key): entry for key, entry in value.items()}
        if max(entries) < kept.count:
            new = {at: entries[old] for at, old in enumerate(kept.layers) if old in entries}
            kept.settings[name] = new  # its class may turn the keys into others


def _attention_types(kept: _Kept) -> None:
    """GPT-Neo's ``[[["global", "local"], 12]]``, from the list that it stands for."""
    if kept.has("attention_types", "attention_layers"):
        types = [[[kind], 1] for kind in kept.settings["attention_layers"]]
        kept.set("attention_types", types)


def _first(kept: _Kept) -> None:
    for name in _FIRST:
        if kept.has(name):
            kept.set(name, len(kept.positions(range(int(kept.settings[name])))))


def _cycle(kept: _Kept) -> None:
    """RecurrentGemma: kinds of layers that come again and again."""
    if kept.has("block_types"):
        kinds = kept.settings["block_types"]
        kept.set("block_types", [kinds[i % len(kinds)] for i in kept.layers])


def _sparse_step(kept: _Kept) -> None:
    """Qwen: every so many layers have experts, unless listed: all those without are listed."""
    if not kept.has("decoder_sparse_step") or "mlp_only_layers" not in kept.settings:
        return
    step = int(kept.settings["decoder_sparse_step"])
    sparse = set(range(step - 1, kept.count, step)) - set(kept.settings["mlp_only_layers"] or [])
    kept.set("mlp_only_layers", kept.positions(set(range(kept.count)) - sparse))
    kept.set("decoder_sparse_step", 1)


def _interval(kept: _Kept) -> None:
    """Ernie: layers with experts from a first to a last one, every so many."""
    names = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
    if not kept.has(*names):
        return
    first, last, every = (int(kept.settings[name]) for name in names)
    last = kept.count - 1 if last == -1 else min(last, kept.count - 1)
    sparse = kept.positions({i for i in range(first, last + 1) if (i + 1) % every == 0})
    if sparse and sparse == list(range(sparse[0], sparse[-1] + 1)):
        for name, value in zip(names, (sparse[0], sparse[-1], 1), strict=True):
            kept.set(name, value)


def _periods(kept: _Kept) -> None:
    """Jamba: the layers ``i % period == offset`` have attention, or experts."""
    for name in [name for name in kept.settings if name.endswith("_layer_period")]:
        other = name.replace("_period", "_offset")
        if not kept.has(name, other):
            continue
        offset, period = int(kept.settings[other]), int(kept.settings[name])
        wanted, new = kept.positions(range(offset, kept.count, period)), len(kept.layers)
        pairs = ((every, first) for every in range(1, new + 2) for first in range(every))
        found = (pair for pair in pairs if list(range(pair[1], new, pair[0])) == wanted)
        for key, value in zip((name, other), next(found, ()), strict=False):
            kept.set(key, value)


def _depth(kept: _Kept) -> None:
    """MiniCPM: each layer adds ``scale_depth / sqrt(layers)`` times what it computes."""
    if kept.has("scale_depth"):
        share = math.sqrt(len(kept.layers) / kept.count)
        kept.set("scale_depth", kept.settings["scale_depth"] * share)


#: In this order: what goes with a list rewrites it, too; `_attention_types` reads a new one.
_REPAIRS = (
    _first,
    _cycle,
    _sparse_step,
    _interval,
    _periods,
    _depth,
    _lists,
    _by_layer,
    _attention_types,
)
