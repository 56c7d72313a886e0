"""Distillation over transformers: the trainer, its options, its terms and its teachers.

No mathematics: losses come from :mod:`kdkernels` and :mod:`kdkernels.losses`. This package decides
what a loss gets, what it is divided by, and what a checkpoint holds.
"""

from .arguments import DistillationArguments
from .trainer import DistillationTrainer

__all__ = ["DistillationArguments", "DistillationTrainer"]
