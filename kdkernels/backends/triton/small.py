"""The kernels beside the row kernel: count rows, sum their losses, scale a gradient."""

# mypy: disable-error-code="no-untyped-def"
# A condition on a constant is decided when the kernel is compiled.
# ruff: noqa: SIM102, SIM108
import triton
import triton.language as tl

from .arithmetic import rounded


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def count_rows(labels_ptr, items_ptr, rows, ignore_index, SIZE: tl.constexpr):
    """items = the number of rows that count, at least 1. One program."""
    offset = tl.arange(0, SIZE)
    count = tl.zeros([SIZE], tl.int32)
    for first in range(0, rows, SIZE):
        inside = first + offset < rows
        label = tl.load(labels_ptr + first + offset, mask=inside, other=ignore_index)
        count += tl.where(label == ignore_index, 0, 1)
    tl.store(items_ptr, tl.maximum(tl.sum(count, 0), 1).to(tl.float32))


@triton.jit(do_not_specialize=["rows"])
def sum_rows(rows_ptr, sum_ptr, rows, SIZE: tl.constexpr):
    """The sum of the rows' losses in float64, in a fixed order. One program."""
    offset = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float64)
    for first in range(0, rows, SIZE):
        inside = first + offset < rows
        total += tl.load(rows_ptr + first + offset, mask=inside, other=0.0).to(tl.float64)
    tl.store(sum_ptr, tl.sum(total, 0).to(tl.float32))


@triton.jit
def scale_rows(
    source_ptr, out_ptr, upstream_ptr, rows, width, source_row, out_row, upstream_stride,
    BLOCK: tl.constexpr, PER_ROW: tl.constexpr, IN_PLACE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = source * upstream, rounded once; in place, what is multiplied by 1 is not touched. 0 as
    either factor gives 0, also beside inf or NaN.

    Persistent: the grid does not grow with the work, so that a launch with none costs the same for
    any size.
    """
    offset = tl.arange(0, BLOCK)
    chunks = tl.cdiv(width, BLOCK)
    units = chunks * (rows + tl.program_id(0).to(tl.int64) * 0)
    factor = tl.load(upstream_ptr).to(tl.float32)
    if not PER_ROW:
        if IN_PLACE:
            units = tl.where(factor == 1, 0, units)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row = units * 0 + unit // chunks
        if PER_ROW:
            factor = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
        column = unit % chunks * BLOCK + offset
        if IN_PLACE:
            inside = column < tl.where(factor == 1, 0, width)
        else:
            inside = column < width
        source = tl.load(source_ptr + row * source_row + column, mask=inside, other=0.0)
        source = source.to(tl.float32)
        product = tl.where(factor == 0, 0.0, source * factor)
        product = tl.where(source == 0, 0.0, product)
        out = rounded(product, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + row * out_row + column, out, mask=inside)
