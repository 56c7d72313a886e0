"""What keeps a model from being saved, found and mended before it is trained."""

from __future__ import annotations

import re

import torch
from transformers import GenerationConfig, PreTrainedModel

#: transformers names one problem after the other: so often is it asked at most.
_MOST_PROBLEMS = 20


def repair_generation(model: PreTrainedModel) -> str | None:
    """Take out of ``model.generation_config`` what transformers refuses to save; says what it was.

    Many chat models come with a temperature and no ``do_sample``. That loads, and is refused once
    something else of the configuration has changed: at the first checkpoint. Such settings have no
    effect as they stand, so that leaving them out changes nothing. None: it can be saved.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return None
    unset: list[str] = []
    for _ in range(_MOST_PROBLEMS):
        try:
            config.validate(strict=True)
        except (ValueError, TypeError) as error:
            names = _named(str(error), config)
            if not names:
                break
            for name in names:
                _unset(config, name)
            unset += names
        else:
            return _told(unset) if unset else None
    fresh = GenerationConfig()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(fresh, name, getattr(config, name, None))
    model.generation_config = fresh
    return _told(["everything but its special tokens"])


def _named(message: str, config: GenerationConfig) -> list[str]:
    """The settings that are wrong, in a message that names them and others in backquotes."""
    listed = re.findall(r"^- `(\w+)`:", message, re.MULTILINE)
    names = listed or re.findall(r"`(\w+)`", message)
    return [name for name in dict.fromkeys(names) if name in vars(config)]


def _unset(config: GenerationConfig, name: str) -> None:
    usual = vars(GenerationConfig())
    if name in usual:
        setattr(config, name, usual[name])
    else:
        delattr(config, name)


def _told(unset: list[str]) -> str:
    return (
        f"generation_config: {', '.join(unset)} cannot be saved as it stands and is left out of "
        "the student's"
    )


@torch.no_grad()
def not_finite(model: torch.nn.Module) -> str | None:
    """The name of the first weight that holds NaN or an infinite number; None: there is none."""
    for name, weight in model.named_parameters():
        # 8-bit formats have no isfinite.
        looked_at = weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta
        if looked_at and not bool(torch.isfinite(weight).all()):
            return name
    return None
