"""A kernel that evaluates the device's functors entry by entry, for test_triton.py."""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from kdkernels.backends.triton.functors import slope, value


@triton.jit
def entries(log_p_ptr, log_q_ptr, value_ptr, slope_ptr, first, second, P: tl.constexpr):
    at = tl.arange(0, 256)
    log_p, log_q = tl.load(log_p_ptr + at), tl.load(log_q_ptr + at)
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    tl.store(value_ptr + at, value(p, q, log_p, log_q, first, second, P))
    tl.store(slope_ptr + at, slope(p, q, log_p, log_q, 0.0, first, second, P))
