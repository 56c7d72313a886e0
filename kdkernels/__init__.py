"""Fused knowledge-distillation losses: one call, native kernels, no probability in memory."""

# torch comes first: the native module must bind to the OpenMP runtime that torch has loaded, so
# that both share one thread pool and torch.set_num_threads is obeyed.
import torch  # noqa: F401  isort: skip

from . import environment
from ._version import __version__
from .backends.gpu import label_errors
from .dispatch import available_backends
from .divergences import Divergence
from .functional import KDLossOutput, fused_kd_loss, fused_topk_kd_loss
from .linear import fused_linear_kd_loss
from .memory import release_memory
from .modules import FusedLinearKDLoss, KDLoss, TopKKDLoss

__all__ = [
    "Divergence",
    "FusedLinearKDLoss",
    "KDLoss",
    "KDLossOutput",
    "TopKKDLoss",
    "__version__",
    "available_backends",
    "fused_kd_loss",
    "fused_linear_kd_loss",
    "fused_topk_kd_loss",
    "label_errors",
    "release_memory",
]

environment.warn_of_unknown()
