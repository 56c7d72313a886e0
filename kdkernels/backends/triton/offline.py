"""Compile the kernels for a GPU that is not there: for tests and ``tools/kernel_report.py``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .policy import Variant

#: Triton's targets by the names that the report uses.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass
class Compiled:
    """One launch that was compiled instead of run."""

    name: str
    grid: tuple[int, ...]
    variant: Variant | None  # of the row kernel
    num_warps: int
    kernel: Any  # triton's CompiledKernel: .asm["ptx"], .asm["cubin"], .metadata


def _compile(fn: Any, target: GPUTarget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    backend = make_backend(target)
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    packed, signature, constants, attributes = fn._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(fn, signature, constants, attributes)
    return triton.compile(source, target=target, options=packed.__dict__)


@contextlib.contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Compiled]]:
    """Within this context launches are compiled for ``target`` and listed, not run."""
    launches: list[Compiled] = []
    run = JITFunction.run

    def compile_instead(fn: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = _compile(fn, target, args, kwargs)
        constants = dict(zip(fn.arg_names, args, strict=False)).get("P")
        variant = None if constants is None else constants.variant
        launches.append(Compiled(fn.__name__, grid, variant, kwargs.get("num_warps", 4), kernel))
        return kernel

    JITFunction.run = compile_instead
    try:
        yield launches
    finally:
        JITFunction.run = run
