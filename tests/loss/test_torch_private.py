"""Every private name of torch that the package uses, each called once; and that there is no other.

Where one of these fails with a new torch, that torch has changed the name or what it does.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import kdkernels
from kdkernels import torch_private

PACKAGE = Path(kdkernels.__file__).parent
#: torch._x, torch.x._y, torch._C.x, forward_ad._x
PRIVATE = re.compile(r"\b(?:torch|forward_ad)(?:\.[a-z]\w*)*\._[A-Za-z]\w*")


def test_no_other_module_uses_a_private_name() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if PRIVATE.search(path.read_text())
    }
    assert found == {"torch_private.py"}


def test_a_torch_that_lacks_a_name_is_refused_by_it() -> None:
    with pytest.raises(ImportError, match=r"has no torch\._C\._no_such_thing"):
        torch_private._private("_C._no_such_thing")


def test_the_dispatch_keys_below_autograd() -> None:
    assert not torch_private.AFTER_AUTOGRAD.has(torch.DispatchKey.AutogradCPU)
    assert torch_private.AFTER_AUTOGRAD.has(torch.DispatchKey.CPU)


def test_a_delayed_error_is_raised_by_the_backward() -> None:
    x = torch.ones(2, requires_grad=True)
    y = torch_private.delayed_error("the message", 1)(x)
    with pytest.raises(RuntimeError, match="the message"):
        y.sum().backward()


@pytest.mark.parametrize("keeps", (True, False))
def test_whether_a_backward_keeps_its_graph(keeps: bool) -> None:
    seen = []

    class Asked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(torch_private.keeps_graph())
            return gradient

    Asked.apply(torch.ones((), requires_grad=True)).backward(retain_graph=keeps)
    assert seen == [keeps]


def test_transforms_and_tangents() -> None:
    seen = []

    def asked(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch_private.are_transforms_active(), torch_private.is_observed()))
        return x.sum()

    x = torch.ones(2)
    torch.func.grad(asked)(x)
    asked(x)
    assert seen == [(True, True), (False, False)]
    assert not torch_private.has_tangent(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(2))
        assert torch_private.has_tangent(dual) and not torch_private.has_tangent(x)
        assert torch_private.is_observed()


class _Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    (_Dispatch, torch.overrides.BaseTorchFunctionMode, torch.autograd.profiler.profile),
    ids=("dispatch", "function", "profiler"),
)
def test_modes_observe(mode: Any) -> None:
    with mode():
        assert torch_private.is_observed()
    assert not torch_private.is_observed()


def test_a_trace_observes() -> None:
    seen = []

    def asked(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.is_observed())
        return x + 1

    torch.jit.trace(asked, torch.ones(2), check_trace=False)
    assert seen == [True]


def test_hooks_for_saved_tensors() -> None:
    assert not torch_private.has_saved_tensor_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert torch_private.has_saved_tensor_hooks()


def test_autograd_inside_an_op_that_runs_below_it() -> None:
    x = torch.ones(2, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert not (x * 2).requires_grad
        with torch_private.autograd_included():
            assert (x * 2).requires_grad


def test_references_to_a_storage() -> None:
    storage = torch.UntypedStorage(8)
    assert torch_private.storage_use_count(storage) == 1
    tensor = torch.empty(0).set_(storage, 0, (2,), (1,))
    assert torch_private.storage_use_count(storage) == 2
    del tensor
    assert torch_private.storage_use_count(storage) == 1


def test_what_the_processor_has() -> None:
    assert torch_private.has_avx512_bf16() in (True, False)
    assert torch_private.has_amx_tile() in (True, False)


@pytest.mark.gpu
def test_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch_private.raw_stream(stream.device_index) == stream.cuda_stream


@pytest.mark.gpu
@pytest.mark.skipif(not torch_private.has_grouped_products(), reason="this torch has none")
def test_grouped_products() -> None:
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
        pytest.skip("the package uses them on sm_90 and sm_100")
    left, right = (torch.randn(16, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ends = torch.tensor([5], dtype=torch.int32, device="cuda")
    product = torch_private.grouped_product(left, right[None], ends)
    assert torch.equal(product[:5], (left @ right)[:5])


def test_a_constant_result_is_what_torch_compile_takes_for_one() -> None:
    calls = []

    @torch_private.constant_result
    def answer() -> int:
        calls.append(1)
        return 42

    assert vars(answer) == vars(torch.compiler.assume_constant_result(lambda: 42))
    compiled = torch.compile(lambda x: x + answer(), fullgraph=True, backend="eager")
    assert [float(compiled(torch.ones(()))) for _ in range(3)] == [43.0] * 3 and len(calls) == 1


def test_the_import_leaves_the_compiler_out() -> None:
    code = "import kdkernels, sys; print({'torch._dynamo', 'sympy', 'triton'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")
