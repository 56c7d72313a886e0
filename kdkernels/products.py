"""The matrix products of an output layer, on tiles of logits in float32: which precision they use.

Inputs of the tile's own dtype are multiplied as they are. Half-precision ones are multiplied

- in float32, in pieces, on a CPU without native half-precision products (oneDNN or MKL emulate
  them at 1 % of the float32 rate there: 0.84 to 20 GFLOP/s against 100 on a Zen 3);
- in bfloat16 with float32 accumulation where the CPU has instructions for it (AVX-512 BF16, AMX;
  550 to 950 GFLOP/s against 170 to 200 in float32 on two threads of a Zen 5). torch rounds such a
  product to bfloat16, which would cost the loss its accuracy; so the logits are computed as the
  rounded product plus the rounded rest that a second product gives: relative error 2^-18. The
  gradients take one product, of the tile's gradient rounded to bfloat16, as every mixed-precision
  backward does;
- as they are, with float32 results, on NVIDIA GPUs from sm_80, whose tensor cores accumulate in
  float32 anyway: the logits lose nothing. bfloat16 gradients again take the rounded gradient of the
  tile (:func:`rounds`), all of its columns at once; float16 ones stay in float32, since a mean's
  gradient, at most 1 / tokens an entry and far less for most, is subnormal or 0 in float16.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from .torch_private import (
    grouped_product,
    has_amx_tile,
    has_avx512_bf16,
    has_grouped_products,
)

#: Bytes of the piece of a half-precision weight that is handled at a time, as float32. In pieces,
#: since a float32 copy of the whole weight would be as large as its gradient. On an accelerator
#: they are larger: each is a launch, and one of 16 MiB is 1024 columns at a hidden size of 4096.
PIECE_BYTES = 16 << 20
PIECE_BYTES_ACCELERATOR = 128 << 20


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively, and torch knows it."""
    has_instructions = has_avx512_bf16() or has_amx_tile()
    return has_instructions and torch.backends.mkldnn.is_available()


_NATIVE_BFLOAT16 = native_bfloat16()


def _in_bfloat16(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    return (
        _NATIVE_BFLOAT16
        and hidden.dtype == weight.dtype == torch.bfloat16
        and dtype == torch.float32
        and hidden.device.type == "cpu"
    )


@functools.cache
def wide_results(device: torch.device) -> bool:
    """Whether this device's products of half-precision matrices can have float32 results.

    Not on ROCm, whose torch 2.9 refuses them, nor before sm_80, which has no bfloat16 products.
    """
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _wide(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    return half and dtype == torch.float32 and wide_results(hidden.device)


def rounds(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tile's gradient is rounded whole: then each product of it is rounded only once."""
    return hidden.dtype == torch.bfloat16 and _wide(hidden, weight, dtype)


#: Whether grouped products leave out rows that do not count, where torch has them and only the
#: device knows the number. Their results are bfloat16, so the projections, whose results are
#: float32, still take all rows, and only a single tile is multiplied so: of several each product
#: would be rounded. Measured on an H200 (torch 2.11, 4096 tokens x 4096 x 128256, bare products
#: 22.6 ms): 28.2 ms instead of 29.4 where all rows count, 24.6 instead of 27.5 where half of them
#: do, and 1.2 GB more at the peak.
GROUPED_PRODUCTS = True


@functools.cache
def _has_grouped_products(device: torch.device) -> bool:
    """Whether torch has CUTLASS's grouped products there; elsewhere it waits for the offsets."""
    return (
        sys.platform == "linux"
        and device.type == "cuda"
        and wide_results(device)
        and has_grouped_products()
        and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
    )


def ragged(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether :func:`propagate` leaves out rows whose number only the device knows.

    The grouped products need rows that start at multiples of 16 bytes.
    """
    return (
        GROUPED_PRODUCTS
        and rounds(hidden, weight, dtype)
        and _has_grouped_products(hidden.device)
        and hidden.shape[-1] % 8 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 8 == 0
        and weight.storage_offset() % 8 == 0
    )


def factor_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the hidden states are multiplied in for logits in ``dtype``."""
    as_given = _wide(hidden, weight, dtype) or _in_bfloat16(hidden, weight, dtype)
    return hidden.dtype if as_given else dtype


def _pieces(
    weight: Tensor, tile_dtype: torch.dtype, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Columns of a tile and their rows of the weight in ``dtype``.

    All at once if the weight is in the tile's dtype already.
    """
    if weight.dtype == tile_dtype:
        yield slice(None), weight
        return
    size = PIECE_BYTES if weight.device.type == "cpu" else PIECE_BYTES_ACCELERATOR
    vocab, hidden = weight.shape
    step = max(1, size // (max(hidden, 1) * tile_dtype.itemsize))
    memory = weight.new_empty(
        (0 if weight.dtype == dtype else min(step, vocab), hidden), dtype=dtype
    )
    for start in range(0, vocab, step):
        part = slice(start, min(start + step, vocab))
        rows = weight[part]
        yield part, rows if rows.dtype == dtype else memory[: rows.shape[0]].copy_(rows)


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [rows, V] = hidden [rows, H] @ weight [V, H]^T, to the precision of out's dtype."""
    if _wide(hidden, weight, out.dtype):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        return
    native = _in_bfloat16(hidden, weight, out.dtype)
    hidden = hidden.to(factor_dtype(hidden, weight, out.dtype))
    for part, rows in _pieces(weight, out.dtype, hidden.dtype):
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
    *,
    add: bool,
    rounded: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """The gradient of a tile of logits [rows, V], to what made it.

    ``to_hidden`` [rows, H] is written; ``to_weight`` [V, H] is added to if ``add``, else written.
    They are in the tile's dtype or, where the tile :func:`rounds`, also in the inputs'; then
    ``rounded`` is memory for the rounded tile, and only then it is given.

    ``count`` [1], where products are :func:`ragged`: only so many rows are multiplied, the first
    ones. The others' ``to_hidden`` is left undefined.
    """
    if to_hidden is None and to_weight is None:
        return
    if rounded is not None:
        dtype, pieces = rounded.dtype, iter([(slice(None), weight)])
        tile = rounded.copy_(tile)
        if count is not None:
            if to_hidden is not None:
                to_hidden.copy_(grouped_product(tile, weight.unsqueeze(0), count))
            if to_weight is not None:
                product = grouped_product(tile.t(), hidden, count)[0]
                to_weight.add_(product) if add else to_weight.copy_(product)
            return
    else:
        dtype = hidden.dtype if _in_bfloat16(hidden, weight, tile.dtype) else tile.dtype
        pieces = _pieces(weight, tile.dtype, dtype)
    hidden = hidden.to(dtype)
    for part, rows in pieces:
        gradient = tile[:, part].to(dtype)
        if to_hidden is not None:
            _multiply(gradient, rows, to_hidden, add=bool(part.start))
        if to_weight is not None:
            _multiply(gradient.t(), hidden, to_weight[part], add=add)


#: torch 2.10 refuses, or once refused, a float32 total of half-precision factors in ``addmm``.
_ADDS_TO_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def _multiply(left: Tensor, right: Tensor, total: Tensor, *, add: bool) -> None:
    """total = left @ right, or total += it. A float32 total of half factors is not rounded between
    on a device of :func:`wide_results`; on a CPU it is.
    """
    dtype = total.dtype
    if dtype == left.dtype:
        torch.addmm(total, left, right, out=total) if add else torch.mm(left, right, out=total)
    elif not wide_results(total.device):
        total.add_(left @ right) if add else total.copy_(left @ right)
    elif not add:
        torch.mm(left, right, out_dtype=dtype, out=total)
    elif _ADDS_TO_FLOAT32:
        # Reads and writes the total once, where a sum with a product of its own does so twice.
        torch.addmm(total, left, right, out_dtype=dtype, out=total)
    else:
        total += torch.mm(left, right, out_dtype=dtype)
