"""What models add to their own loss beside cross-entropy, in ``transformers.Trainer``."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .layer_configs import parts
from .models import describe
from .tasks import base_of

#: How architectures call the weight of their router's loss, in the model or its configuration.
_ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")


def router_weight(model: nn.Module) -> float | None:
    """Weight of the loss that balances the load of a mixture's experts; None: it is not asked for.

    The loss itself is ``aux_loss`` of the model's outputs, which ``output_router_logits`` of the
    configuration asks for.

    Raises:
        ValueError: it is asked for, and the model does not say what it weighs; or the model has
            another loss of its own.
    """
    model = base_of(model)
    _refuse_own_z_loss(model)
    configs = list(parts(model.config))
    if not any(getattr(config, "output_router_logits", False) for config in configs):
        return None
    for owner in (model, *configs):
        for name in _ROUTER_WEIGHTS:
            if isinstance(getattr(owner, name, None), float | int):
                return float(getattr(owner, name))
    raise ValueError(
        f"model: {describe(model)} has output_router_logits, but no {' or '.join(_ROUTER_WEIGHTS)} "
        "that says what its router's loss weighs"
    )


def _refuse_own_z_loss(model: PreTrainedModel) -> None:
    """Bamba's is ours with another denominator: it has to be said which one is meant."""
    own = getattr(model.config, "z_loss_coefficient", 0.0)
    if own:
        raise ValueError(
            f"model: {describe(model)} has a z_loss_coefficient of {own}; set it to 0 and name "
            f"z_loss: {own} in the arguments instead"
        )
