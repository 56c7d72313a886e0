"""The dtypes that an option can name."""

from __future__ import annotations

import torch

#: Of logits, and of a model's weights.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Of weights: as they are, or as they are stored; weights that are made are float32.
AUTO = "auto"
WEIGHT_DTYPES = (AUTO, *DTYPES)
