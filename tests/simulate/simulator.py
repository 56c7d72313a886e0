"""The CUDA backend on CPU tensors: its real launcher and PTX, run by the emulator ptxsim.

What this proves: the kernels compute the right numbers, touch only the memory they were given, have
no race in shared or global memory, and move as many bytes as counted. test_cuda_machine_code.py
proves registers and spilling. What only a device can prove: speed, and that clusters are scheduled.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from kdkernels.environment import setting

ROOT = Path(__file__).resolve().parents[2]


def folder() -> Path:
    """Of ptxsim: KDKERNELS_PTXSIM, or ``../shared/ptxsim`` beside the checkout."""
    chosen = setting("KDKERNELS_PTXSIM")
    return Path(chosen) if chosen else ROOT.parent / "shared" / "ptxsim"


def why_no_ptxsim() -> str | None:
    """Why no PTX can be executed here, or None."""
    if (folder() / "sim.py").exists():
        return None
    return f"ptxsim is not at {folder()} (KDKERNELS_PTXSIM names its folder)"


def why_no_nvcc() -> str | None:
    """Why no CUDA source can be compiled here, or None."""
    if os.environ.get("NVCC") or os.environ.get("CUDA_HOME") or shutil.which("nvcc"):
        return None
    return "nvcc was not found"


def why_no_stand_in() -> str | None:
    """Why ptxsim's CUDA runtime cannot stand in for NVIDIA's in this process, or None."""
    if torch.version.cuda is None:
        return None
    return f"torch {torch.__version__} has loaded NVIDIA's CUDA runtime: a CPU build is needed"


def _import(name: str) -> Any:
    sys.path.insert(0, str(folder().parent))
    try:
        return importlib.import_module(f"{folder().name}{name}")
    finally:
        sys.path.pop(0)


@functools.cache
def ptxsim() -> Any:
    return _import("")


def building() -> FileLock:
    """Held while something is built, which another pytest worker may want at the same time."""
    (ROOT / "build").mkdir(exist_ok=True)
    return FileLock(ROOT / "build" / "simulate.lock")


@functools.cache
def fake() -> Any:
    """The stand-in CUDA runtime of ptxsim."""
    module = _import(".fake")
    with building():
        module.runtime()
    return module


_WHY_NOT = why_no_nvcc() or why_no_ptxsim() or why_no_stand_in()
#: Of test files that run the CUDA kernels.
needs_simulator = pytest.mark.skipif(bool(_WHY_NOT), reason=str(_WHY_NOT))


@functools.cache
def native() -> Any:
    """The native module with the shared CUDA runtime and PTX, built beside the ordinary one."""
    target = ROOT / "build" / "simulate"
    options = {"KDKERNELS_CUDA": "1", "KDKERNELS_CUDART": "shared", "KDKERNELS_CUDA_ARCHS": "90"}
    call = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target)]
    call += ["--build-temp", str(target / "objects")]
    with building():
        done = subprocess.run(
            call, cwd=ROOT, env=os.environ | options, capture_output=True, text=True, check=False
        )
    if done.returncode:
        pytest.fail(f"the simulated build fails:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    fake()  # first: the module needs the stand-in's libcudart
    path = next((target / "kdkernels").glob("_native*.so"))
    spec = importlib.util.spec_from_file_location("kdkernels_simulated._native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """Stands in for the native module: registers what the backend hands over, keeps the counts."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.launches: list[Any] = []
        self.seed = seed

    def note(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.numel():
            self.tensors.setdefault(f"{name}{len(self.tensors)}", tensor)

    def __getattr__(self, name: str) -> Any:
        function = getattr(native(), name)
        if name not in ("cuda_kd_loss", "cuda_scale_gradient"):
            return function

        def run(*arguments: Any) -> Any:
            with fake().Session(options={"seed": self.seed}, **self.tensors) as session:
                result = function(*arguments)
            self.launches += session.stats
            self.tensors.clear()
            return result

        return run


@contextmanager
def simulated(seed: int = 0) -> Iterator[Recorder]:
    """Within it the CUDA backend takes CPU tensors; yields the launches with their counts.

    Every error that ptxsim reports (out of bounds, race, ...) raises.
    """
    from kdkernels.backends import BACKENDS, cuda
    from kdkernels.backends import native as shared

    recorder = Recorder(seed)
    backend = BACKENDS["cuda"]
    patch = pytest.MonkeyPatch()
    pointer, row_layout = shared.pointer, shared.row_layout

    def noted_pointer(tensor: Tensor | None) -> int:
        recorder.note("tensor", tensor)
        return pointer(tensor)

    def noted_layout(*tensors: Tensor, teacher_rows: Tensor | None = None) -> Any:
        layout = row_layout(*tensors, teacher_rows=teacher_rows)
        # A sparse teacher has no layout.
        for name, tensor in zip(("student", "teacher"), layout.tensors, strict=False):
            recorder.note(name, tensor)
        return layout

    patch.setattr(cuda, "_native", recorder, raising=False)
    patch.setattr(type(backend), "module", recorder)
    patch.setattr(cuda, "_DIVERGENCES", frozenset(native().divergence_names()))
    patch.setattr(cuda, "pointer", noted_pointer)
    patch.setattr(shared, "pointer", noted_pointer)
    patch.setattr(shared, "row_layout", noted_layout)
    patch.setattr(cuda, "_stream", lambda device: (0, 0))
    patch.setattr(type(backend), "unavailable", lambda self: [])
    patch.setattr(type(backend), "device_type", "cpu")
    try:
        yield recorder
    finally:
        patch.undo()
