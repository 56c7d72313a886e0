"""The matrix products of an output layer, on tiles of logits in float32: which precision they use.

Inputs of the tile's own dtype are multiplied as they are. Half-precision ones are multiplied

- in float32, in pieces, on a CPU without native half-precision products (oneDNN or MKL emulate
  them at 1 % of the float32 rate there: 0.84 to 20 GFLOP/s against 100 on a Zen 3);
- in bfloat16 with float32 accumulation where the CPU has instructions for it (AVX-512 BF16, AMX;
  550 to 950 GFLOP/s against 170 to 200 in float32 on two threads of a Zen 5). torch rounds such a
  product to bfloat16, which would cost the loss its accuracy; so the logits are computed as the
  rounded product plus the rounded rest that a second product gives: relative error 2^-18. The
  gradients take one product, of the tile's gradient rounded to bfloat16, as every mixed-precision
  backward does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Bytes of the piece of a half-precision weight that is handled at a time, as float32. In pieces,
#: since a float32 copy of the whole weight would be as large as its gradient.
PIECE_BYTES = 16 << 20


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively, and torch knows it."""
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_instructions and torch.backends.mkldnn.is_available()


_NATIVE_BFLOAT16 = native_bfloat16()


def _in_bfloat16(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    return (
        _NATIVE_BFLOAT16
        and hidden.dtype == weight.dtype == torch.bfloat16
        and dtype == torch.float32
        and hidden.device.type == "cpu"
    )


def _pieces(
    weight: Tensor, tile_dtype: torch.dtype, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Columns of a tile and their rows of the weight in ``dtype``.

    All at once if the weight is in the tile's dtype already.
    """
    if weight.dtype == tile_dtype:
        yield slice(None), weight
        return
    step = max(1, PIECE_BYTES // (max(weight.shape[1], 1) * tile_dtype.itemsize))
    for start in range(0, weight.shape[0], step):
        part = slice(start, min(start + step, weight.shape[0]))
        yield part, weight[part].to(dtype)


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [rows, V] = hidden [rows, H] @ weight [V, H]^T, to the precision of out's dtype."""
    native = _in_bfloat16(hidden, weight, out.dtype)
    dtype = hidden.dtype if native else out.dtype
    hidden = hidden.to(dtype)
    for part, rows in _pieces(weight, out.dtype, dtype):
        if native:
            rounded = torch.mm(hidden, rows.t())
            rest = torch.addmm(rounded, hidden, rows.t(), beta=-1)
            out[:, part].copy_(rest).add_(rounded)
        else:
            torch.mm(hidden, rows.t(), out=out[:, part])


def propagate(
    tile: Tensor,
    hidden: Tensor,
    weight: Tensor,
    to_hidden: Tensor | None,
    to_weight: Tensor | None,
) -> None:
    """The gradient of a tile of logits [rows, V], to what made it.

    ``to_hidden`` [rows, H] and ``to_weight`` [V, H], in the tile's dtype, are added to.
    """
    dtype = hidden.dtype if _in_bfloat16(hidden, weight, tile.dtype) else tile.dtype
    hidden = hidden.to(dtype)
    for part, rows in _pieces(weight, tile.dtype, dtype):
        gradient = tile[:, part].to(dtype)
        if to_hidden is not None:
            _add_product(to_hidden, gradient, rows)
        if to_weight is not None:
            _add_product(to_weight[part], gradient.t(), hidden)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
