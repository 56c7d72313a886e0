"""Everything private that the package uses of torch, by name.

torch promises nothing about these names, and has no public ones for what they do. Each is looked up
when the package is imported, and a torch that lacks one is refused with its name. No other module
names a private function of torch; tests/loss/test_torch_private.py sees to it, and calls each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _private(path: str) -> Any:
    found: Any = torch
    for name in path.split("."):
        if not hasattr(found, name):
            raise ImportError(
                f"torch {torch.__version__} has no torch.{path}, which kdkernels uses: "
                "install a torch that this version of kdkernels supports"
            )
        found = getattr(found, name)
    return found


# ---- autograd and dispatch ----------------------------------------------------------------------

#: The dispatch keys below autograd's.
AFTER_AUTOGRAD = _private("_C._after_autograd_keyset")
#: (message, number of inputs) -> a function whose backward raises the message.
delayed_error = _private("_C._functions.DelayedError")
#: Whether the running backward keeps its graph, so that it may be repeated.
keeps_graph = _private("_C._autograd._get_current_graph_task_keep_graph")
are_transforms_active = _private("_C._are_functorch_transforms_active")

_saved_tensor_hooks = _private("_C._autograd._top_saved_tensors_default_hooks")
_dispatch_modes = _private("_C._len_torch_dispatch_stack")
_function_modes = _private("_C._len_torch_function_stack")
_tracing_state = _private("_C._get_tracing_state")
_is_profiling = _private("_C._autograd._profiler_enabled")
_private("autograd.forward_ad._current_level")  # a variable: read anew each time
_excluded_keys = _private("_C._dispatch_tls_local_exclude_set")
_included_keys = _private("_C._dispatch_tls_local_include_set")
_dispatch_key = _private("_C.DispatchKey")
_force_keys = _private("_C._ForceDispatchKeyGuard")


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether forward-mode differentiation is wanted of the tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def has_saved_tensor_hooks() -> bool:
    """Whether hooks will see what a function saves for its backward."""
    return _saved_tensor_hooks(True) is not None


def is_observed() -> bool:
    """Whether a mode, a transform, a trace or a profiler is to see each op."""
    return bool(
        _dispatch_modes()
        or _function_modes()
        or are_transforms_active()
        or _tracing_state()
        or _is_profiling()
        or forward_ad._current_level >= 0
    )


def autograd_included() -> Any:
    """A context in which ops reach autograd, even inside an op that torch runs below it."""
    excluded = _excluded_keys()
    for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(_dispatch_key, name))
    return _force_keys(_included_keys(), excluded)


# ---- memory, processors, streams ----------------------------------------------------------------

_storage_use_count = _private("_C._storage_Use_Count")
_private("UntypedStorage._cdata")
has_avx512_bf16 = _private("cpu._is_avx512_bf16_supported")
has_amx_tile = _private("cpu._is_amx_tile_supported")


def storage_use_count(storage: torch.UntypedStorage) -> int:
    """How many references to the storage there are."""
    return _storage_use_count(storage._cdata)


def raw_stream(index: int) -> int:
    """The handle of a CUDA device's current stream, without an object; builds with CUDA have it."""
    return torch._C._cuda_getCurrentRawStream(index)


def has_grouped_products() -> bool:
    """Whether this torch has :func:`grouped_product`."""
    return hasattr(torch, "_grouped_mm")


def grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``torch._grouped_mm``: products of groups of rows (or columns), which end at ``ends``."""
    return torch._grouped_mm(left, right, offs=ends)


# ---- torch.compile ------------------------------------------------------------------------------


def constant_result(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which would import the compiler, without that.

    A decorator: torch.compile calls the function while it traces, and keeps the result.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
