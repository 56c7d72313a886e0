"""The Triton kernels compiled for real targets without a GPU: spills, access widths, barriers.

Everything here holds for every release in RELEASES, on sm_90 at least: ``.ci/triton-releases`` runs
what names sm_90 with the oldest, 3.6 (torch 2.9 to 2.11 bring 3.5 and 3.6) and the newest,
beside the one that ``constraints.txt`` installs, with which all of it is run.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def report() -> Any:
    """``tools/kernel_report.py``, with what it imports."""
    from kdkernels.backends.triton import launch

    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: the kernels are interpreted, not compiled")
    load("sass")
    load("cuda_counts")
    return load("kernel_report")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def compiled(report: Any, name: str, target: str) -> Any:
    vocab, student, teacher, options, mode = report.PROBLEMS[name]
    problem = report.make_problem(vocab, student, teacher, options)
    (one,) = report.compile_rows(problem, mode, target)
    return one


#: The first and the last release of Triton for which the counts below were checked.
RELEASES = ((3, 5), (3, 9))
NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")
KL_CE = "KL + CE + grad, T=1"
#: Every kind of body: closed form, odd vocabulary, another exponential, a swept divergence.
EVERYWHERE = (KL_CE, KL_CE + ", V=50257", "KL + CE + grad, T=1.7", "JSD + CE + grad")


def test_the_counts_hold_for_this_release_checked_with_sm_90() -> None:
    import triton

    release = tuple(int(number) for number in triton.__version__.split(".")[:2])
    assert RELEASES[0] <= release <= RELEASES[1]


def test_fused_multiply_and_add_is_asked_for_on_sm_90(report: Any) -> None:
    """Triton 3.9 warns where it is left open, 3.10 leaves it out."""
    from kdkernels.backends.triton import launch

    problem = report.make_problem(128256, torch.bfloat16, torch.bfloat16, {"alpha": 0.5})
    device = report.policy.H100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with report.offline.compiling(report.offline.TARGETS["sm_90"]) as launches:
            result = launch.forward(problem, want_gradient=True, extras=False, device=device)
            launch.scale_gradient(result.gradient, torch.ones((), device="meta"), overwrite=True)
    assert [one.name for one in launches] == ["count_rows", "kd_rows", "sum_rows", "scale_rows"]
    assert all(one.kernel.metadata.enable_fp_fusion for one in launches)


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_no_spill_no_narrow_load_no_barrier_in_the_loops(
    report: Any, name: str, target: str
) -> None:
    (kernel,) = sys.modules["sass"].read(compiled(report, name, target).kernel.asm["cubin"])
    assert kernel.whole.spills == 0 and kernel.stack == 0
    assert len(kernel.loops) == (3 if name.startswith("JSD") else 2)
    for loop in kernel.loops:
        assert set(loop.loads) == {128}
        assert set(loop.stores) <= {128}
        assert loop.barriers == loop.shuffles == loop.shared == 0


@pytest.mark.parametrize("name", ("KL + CE + grad, float32", "KL + CE + grad, bf16 / float32",
                                  "alpha-beta + CE + grad", "skew KL + CE + grad",
                                  "KL + CE + grad, softcap, smoothing, z-loss, T=2"))  # fmt: skip
def test_the_other_bodies_on_sm_90(report: Any, name: str) -> None:
    (kernel,) = sys.modules["sass"].read(compiled(report, name, "sm_90").kernel.asm["cubin"])
    assert kernel.whole.spills == 0
    assert all(set(loop.loads) == {128} and loop.barriers == 0 for loop in kernel.loops)


@pytest.mark.parametrize(
    ("name", "instructions"),
    ((KL_CE, 31), (KL_CE + ", V=50257", 31), ("KL + CE + grad, T=2", 35),
     ("KL + CE, loss only", 20), ("KL + CE, recomputed gradient", 13)),
)  # fmt: skip
def test_the_instruction_budget_on_sm_90(report: Any, name: str, instructions: float) -> None:
    one = compiled(report, name, "sm_90")
    (kernel,) = sys.modules["sass"].read(one.kernel.asm["cubin"])
    counts = report.count(report.Entry(name, kernel, one.variant.tile.columns, one.num_warps, 4, 2))
    assert counts.instructions <= instructions
    assert counts.mufu <= 4.2
    assert counts.bytes <= 10
    assert sys.modules["sass"].resident(kernel.registers, 32 * one.num_warps) >= 4


#: (target, tail, entries a row, options): every tail, and what holds most registers beside it.
SPARSE = (
    ("sm_80", "bucket", 64, {}),
    ("sm_90", "bucket", 64, {}),
    ("sm_90", "bucket", 256, {"divergence": "jsd", "parameters": (0.3,), "temperature": 2.0}),
    ("sm_90", "bucket", 64, {"temperature": 1.7, "student_softcap": 20.0, "z_loss": 1e-3}),
    ("sm_90", "uniform", 64, {"label_smoothing": 0.1}),
    ("sm_90", "subset", 1024, {"divergence": "alpha_beta", "parameters": (0.2, 0.7)}),
    ("sm_90", "none", 64, {}),
    ("sm_100", "uniform", 64, {}),
    ("sm_120", "bucket", 64, {}),
)


@pytest.mark.parametrize("vocab", (8192, 128256))
@pytest.mark.parametrize(("target", "tail", "count", "options"), SPARSE)
def test_a_sparse_teacher_spills_nothing(
    report: Any, target: str, tail: str, count: int, options: dict[str, Any], vocab: int
) -> None:
    """Three loops of the bucket: observe, the others once more where they have nearly nothing, and
    the gradient. None loads anything but the student, 16 bytes at once."""
    launches = sparse_launches(report, target, tail, count, options, vocab)
    assert [one.name for one in launches] == ["count_rows", "kd_entries", "kd_rows", "sum_rows"]
    for one in launches:
        (kernel,) = sys.modules["sass"].read(one.kernel.asm["cubin"])
        assert kernel.whole.spills == 0 and kernel.stack == 0, one.name
        if one.name == "kd_rows":
            assert len(kernel.loops) == (3 if tail == "bucket" else 2)
            for loop in kernel.loops:
                assert set(loop.loads) == {128} and set(loop.stores) <= {128}
                assert loop.barriers == loop.shuffles == loop.shared == 0


def sparse_launches(
    report: Any, target: str, tail: str, count: int, options: dict[str, Any], vocab: int
) -> list[Any]:
    from kdkernels.backends.triton import launch
    from kdkernels.problem import Options, Problem

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 8192
    problem = Problem(
        empty(rows, vocab, dtype=torch.bfloat16), empty(rows, count, dtype=torch.float64),
        empty(rows, dtype=torch.int64), None, None, Options(alpha=0.5, tail=tail, **options),
        empty(rows, count, dtype=torch.int64),
    )  # fmt: skip
    device = report.policy.H100._replace(kind="hip", architecture=0, warp=64)
    if target != "gfx942":
        device = report.policy.H100._replace(architecture=int(target.removeprefix("sm_")))
    launches: list[Any]
    with report.offline.compiling(report.offline.TARGETS[target]) as launches:
        launch.forward(problem, want_gradient=True, extras=True, device=device)
    return launches


def test_a_sparse_teacher_compiles_for_gfx942(report: Any) -> None:
    launches = sparse_launches(report, "gfx942", "bucket", 64, {}, 32000)
    assert "kd_rows" in [one.name for one in launches]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_gfx942_has_wide_loads_and_no_scratch(report: Any, name: str) -> None:
    numbers = report.amd_numbers(compiled(report, name, "gfx942").kernel.asm["amdgcn"])
    assert ", 0 VGPR spills, 0 B scratch" in numbers, numbers
    assert int(numbers.split(", ")[-1].split()[0]) >= 8, numbers


def test_a_launch_of_every_kind_compiles(report: Any) -> None:
    """Few rows: the vocabulary is split over launches; many rows: over waiting programs."""
    problem = report.make_problem(128256, torch.bfloat16, torch.bfloat16, report.KL_CE, rows=16)
    launches = report.compile_rows(problem, "forward", "sm_90")
    assert [one.variant.sharing.exchange for one in launches] == ["launch", "launch"]
    many_rows = report.make_problem(128256, torch.bfloat16, torch.bfloat16, report.KL_CE)
    (many,) = report.compile_rows(many_rows, "forward", "sm_90")
    assert many.variant.sharing.exchange == "spin"
    assert "gpu" in many.kernel.asm["ptx"] and ".acquire" in many.kernel.asm["ptx"]
