"""What runs in the processes of a day: each function is one step."""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from kdkernels.linear import MAX_CHUNK_BYTES

from .. import machine, measure, record, summary, workloads
from ..measure import Bounds
from ..providers import PROVIDERS, VARIANTS, unasked, variant_provider
from ..workloads import Inputs, Workload
from .plan import CARRIED, ROOT

#: Largest errors of the smoke test: a few ulp of float32, and a gradient's rounding to bfloat16.
_SMOKE_BOUNDS = {"bf16": Bounds(3e-6, 4e-3), "fp32": Bounds(3e-6, 3e-6)}
_ROUNDS = 5
#: How the names of our providers begin.
_OURS = ("fused", "kernel", "chunk_")
#: Workloads of a step in a rehearsal.
_FEW = 3


class Place(NamedTuple):
    """Where a step runs: its device, its lines, its time."""

    lines: Path
    device: str
    dry: bool
    deadline: float

    def note(self, kind: str, value: object) -> None:
        record.append(self.lines, kind, value)


# --- the native module ----------------------------------------------------------------------------


def fingerprint() -> str:
    """Of everything that the native module is made from."""
    digest = hashlib.sha256()
    for path in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*")]):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


_CHECK = """
from kdkernels.backends import native
assert native.WHY_NOT is None, native.WHY_NOT
why = native.MODULE.cuda_why_not(0)
assert not why, why
print(native.MODULE.cuda_description())
"""


def _loads() -> bool:
    return not subprocess.run([sys.executable, "-c", _CHECK], cwd=ROOT).returncode


def native(place: Place) -> None:
    """The module of the run before if it is of these sources, or the carried one, or a new one."""
    if place.dry:
        about(place)
        return
    _find_or_build()
    # In another process: this one has looked for the module before it was there.
    command = [sys.executable, "-m", "benchmarks", "gpu-day", "step", "about"]
    command += [f"--output={place.lines.parent}"]
    subprocess.run(command, cwd=ROOT, check=True)


def _find_or_build() -> None:
    module = ROOT / "kdkernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    stamp, carried = ROOT / "build" / "gpu-day.stamp", CARRIED / module.name
    stamp.parent.mkdir(exist_ok=True)
    sources = fingerprint()
    if module.exists() and stamp.exists() and stamp.read_text() == sources:
        print("the module is there")
        return
    stamp.unlink(missing_ok=True)
    module.unlink(missing_ok=True)  # not overwritten: this process may have it mapped
    made_from = carried.with_suffix(".stamp")
    if carried.exists() and made_from.exists() and made_from.read_text() == sources:
        shutil.copyfile(carried, module)
        if _loads():
            print("the carried module loads")
            stamp.write_text(sources)
            return
        module.unlink()
    build_native([sys.executable], "--inplace")
    if not _loads():
        sys.exit("NO CUDA KERNELS: Triton's alone")
    stamp.write_text(sources)


def build_native(python: list[str], *where: str, arch: str | None = None) -> None:
    """``setup.py build_ext``: the machine has no network for an isolated build."""
    options = {"KDKERNELS_CUDA": "1", "NVCC_APPEND_FLAGS": "-lineinfo"}
    options["MAX_JOBS"] = str(os.cpu_count() or 1)
    if not arch:
        major, minor = torch.cuda.get_device_capability()
        arch = f"{major}{minor}"
    call = [*python, "setup.py", "-q", "build_ext", *where]
    environment = os.environ | options | {"KDKERNELS_CUDA_ARCHS": arch}
    subprocess.run(call, cwd=ROOT, env=environment, check=True)


def about(place: Place) -> None:
    options = {
        # A GPU's host time is not divided among threads.
        "threads": torch.get_num_threads() if place.dry else 1,
        "max_chunk_bytes": MAX_CHUNK_BYTES,
        "device": place.device,
        "dry": place.dry,
    }
    described = machine.describe(place.device)
    value = {"machine": described, "versions": machine.versions(place.device), "options": options}
    place.note("about", value)
    for name in ("cuda", "triton", "cpu"):
        reasons = described.get("backends", {}).get(name, [])
        print(f"{name}: {'; '.join(reasons) or 'runs'}")
    print(described["device"], described.get("cuda_kernels") or described["kernel_isa"])


# --- measurements ---------------------------------------------------------------------------------


def _workloads(place: Place, *groups: str) -> list[Workload]:
    found = [w for w in workloads.gpu_suite() if w.group in groups]
    if not place.dry:
        return found
    return [workloads.tiny(w) for group in groups for w in found if w.group == group][:_FEW]


def _contests(
    place: Place,
    chosen: list[Workload],
    names: Collection[str] | None = None,
    families: Collection[str] | None = None,
    rounds: int = _ROUNDS,
    bounds: dict[str, Bounds] | None = None,
) -> None:
    """Each workload's contest as a line; the step fails if a result of ours is wrong or missing."""
    failures = []
    providers = [
        p
        for p in unasked("cuda")
        if (names is None or p.name in names) and (families is None or p.family in families)
    ]
    # A contest collects garbage every round: not what the imports left, a tenth of a second each.
    gc.collect()
    gc.freeze()
    measure.SAMPLE_SECONDS = 1e-4 if place.dry else measure.SAMPLE_SECONDS
    for index, workload in enumerate(chosen):
        if time.monotonic() > place.deadline:
            print(f"no time left for {', '.join(w.name for w in chosen[index:])}")
            break
        began = time.monotonic()
        peaks: list[record.Memory] = []
        contest = measure.contest(
            workload,
            [p for p in providers if not workload.excludes(p.name, p.family)],
            (2 if place.dry else rounds) if rounds else 0,
            place.device,
            index,
            bounds=bounds and bounds[workload.dtype],
            peaks=peaks if rounds else None,
        )
        place.note("contest", contest)
        for found in peaks:
            place.note("memory", found)
        bad = [
            e
            for e in contest.entries.values()
            if e.status in ("wrong", "failed") and not summary.refused(e)
        ]
        ours = [e.provider for e in bad if e.provider.startswith(_OURS)]
        failures += [f"{workload.name}: {', '.join(ours)}"] if ours else []
        notes = "".join(f"; {e.provider} {e.status}: {e.reason[:100]}" for e in bad)
        print(f"{workload.name}: {time.monotonic() - began:.1f} s{notes}", flush=True)
        if place.device == "cuda":
            torch.cuda.empty_cache()
    if failures:
        sys.exit("WRONG RESULTS, OR NONE: " + "; ".join(failures))


def _emulated() -> bool:
    """Whether ``make simulate`` has built the emulated kernels of these very sources."""
    built = [p.stat().st_mtime for p in ROOT.glob("build/simulate/kdkernels/_native*.so")]
    sources = [p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    return bool(built) and min(built) > max(sources)


@contextlib.contextmanager
def _cuda_kernels(place: Place) -> Iterator[None]:
    """In a rehearsal the CUDA kernels take CPU tensors through ptxsim, where that is built."""
    simulator = None
    if place.dry and _emulated():
        sys.path.insert(0, str(ROOT / "tests" / "simulate"))
        simulator = importlib.import_module("simulator")
    if simulator is None or simulator._WHY_NOT:
        if place.dry:
            print("the CPU's kernel stands in: `make simulate` has not built the emulated ones")
        yield
        return
    with simulator.simulated():
        yield


def smoke(place: Place, kernel: str) -> None:
    """One kernel at every cluster size on rows of every alignment, against float64."""
    names = {variant_provider(*v) for v in VARIANTS if v[0] == kernel}
    chosen = _workloads(place, "smoke")
    if kernel == "default":
        names = {"kernel", "kernel_cuda", "kernel_triton"}
        chosen = [w for w in chosen if w.vocab < 100_000]  # Triton compiles each
    elif place.dry:
        names |= {"kernel"}
    with _cuda_kernels(place):
        _contests(place, chosen, names, rounds=0, bounds=_SMOKE_BOUNDS)


def warm(place: Place) -> None:
    """Compile Triton's kernels of the shapes to come, each in a process; rows do not matter."""
    chosen = [w.name for w in _workloads(place, "kd_ce")][: 1 if place.dry else None]
    command = [sys.executable, "-m", "benchmarks", "gpu-day", "step"]
    command += [f"--output={place.lines.parent}", *(["--dry"] if place.dry else [])]
    running = [subprocess.Popen([*command, "compiled", name], cwd=ROOT) for name in chosen]
    failed = sum(process.wait() != 0 for process in running)
    print(f"{len(running) - failed} of {len(running)} shapes compiled")


def compiled(place: Place, name: str) -> None:
    (workload,) = (w for w in _workloads(place, "kd_ce") if w.name == name)
    few = workloads.replace(workload, rows=min(workload.rows, 256))
    inputs = few.make(place.device)
    for provider in ("fused_triton", "kernel_triton"):
        if not PROVIDERS[provider].absence(few):
            PROVIDERS[provider].prepare(few, inputs)()


def clusters(place: Place) -> None:
    """How many clusters of the launcher's shapes run at once, and on which multiprocessors."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        print("nvcc was not found")
        return
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "clusters"
        arch = "90"
        if not place.dry:
            arch = "".join(map(str, torch.cuda.get_device_capability()))
        flags = ["-std=c++17", f"-arch=sm_{arch}", "-o", str(program)]
        subprocess.run([nvcc, *flags, str(ROOT / "tools" / "clusters.cu")], check=True)
        if place.dry:
            print("compiled")
            return
        done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        place.note("clusters", json.loads(line))
        print(line)


def ceilings(place: Place) -> None:
    """What this card's memory does for plain copies and additions, and what a launch costs."""
    if place.dry:
        machine._ARRAY_BYTES = 1 << 22
    for row in machine.bandwidth(1, place.device):
        place.note("bandwidth", row)
        print(f"{row['name']}: {row['median']:.0f} GB/s (best {row['best']:.0f})")
    if place.device == "cuda":
        launch = machine.launch_microseconds()
        place.note("launch_us", launch)
        print(f"launch: {launch:.2f} us")


def own(place: Place) -> None:
    """Our backends alone: the call, the call that recomputes its gradient, the kernel."""
    _contests(place, _workloads(place, "kd_ce"), families=("fused", "kernel"))


def variants(place: Place) -> None:
    """Both backends on formats and alignments that differ; kernels and cluster sizes, forced."""
    names = {"kernel", "kernel_cuda", "kernel_triton", "kernel_stream"}
    _contests(place, _workloads(place, "mixed"), names)
    names |= {variant_provider(*v) for v in VARIANTS if v[1] in (0, 4, 8, 16)}
    _contests(place, _workloads(place, "variant"), names)


def small(place: Place) -> None:
    names = {f"{kind}_{name}" for kind in ("fused", "kernel") for name in ("cuda", "triton")}
    names |= {"fused", "eager", *(f"graph_{name}" for name in names)}
    _contests(place, _workloads(place, "small"), names)


def peers(place: Place) -> None:
    """Everybody on the same inputs: eager PyTorch, torch.compile, and the libraries."""
    without = {"fused_other_mode", "fused_torch", "compile_log_target", "chunked", "kernel_cuda"}
    if place.dry:  # a compiler on a CPU takes half a minute
        without |= {"compile", "compile_fp32"}
    _contests(place, _workloads(place, "peer"), {p.name for p in unasked("cuda")} - without)


def linear(place: Place) -> None:
    without = {"compile"} if place.dry else set()
    names = {p.name for p in unasked("cuda")} - without - {"chunk_32M", "chunk_64M", "chunk_128M"}
    _contests(place, _workloads(place, "linear", "linear_chunk"), names, rounds=3)


def topk(place: Place) -> None:
    """A sparse teacher, beside the dense loss and the eager form."""
    _contests(place, _workloads(place, "topk"), families=("topk",))


def divergences(place: Place) -> None:
    _contests(place, _workloads(place, "divergence"), families=("fused", "kernel"))


def counted(place: Place) -> None:
    """Each kernel a few times on each shape, for a profiler to count; nothing is checked."""
    for workload in _workloads(place, "variant"):
        few = workloads.replace(workload, rows=min(workload.rows, 2048))
        inputs = few.make(place.device)
        for name in ("kernel_cuda", "kernel_triton") if not place.dry else ("kernel",):
            if not PROVIDERS[name].absence(few):
                step = PROVIDERS[name].prepare(few, inputs)
                for _ in range(2):
                    step()
        if place.device == "cuda":
            torch.cuda.synchronize()
        print(f"ran {workload.name}", flush=True)


def sanitized(place: Place, tool: str) -> None:
    """Few small rows through each kernel at its cluster sizes, for a sanitizer to watch."""
    names = [variant_provider(*v) for v in VARIANTS if v[1] in (1, 2, 8, 16)]
    for vocab in (1000, 4099):
        workload = Workload(f"sanitized/bf16/19x{vocab}/T2", 19, vocab, "bf16")
        # Made on the host: of torch's own kernels as few as can be.
        given = Inputs(*(t if t is None else t.to(place.device) for t in workload.make("cpu")))
        for name in ["kernel"] if place.dry else names:
            try:
                PROVIDERS[name].prepare(workload, given)()
            except ValueError as error:  # a cluster that this row or device does not take
                print(f"{name}: {str(error)[-80:]}")
            if place.device == "cuda":
                torch.cuda.synchronize()
            print(f"{tool}: ran {name} on {workload.rows}x{workload.vocab}", flush=True)


STEPS: dict[str, Callable[..., None]] = {
    "native": native,
    "about": about,
    "warm": warm,
    "compiled": compiled,
    "clusters": clusters,
    "smoke": smoke,
    "ceilings": ceilings,
    "own": own,
    "variants": variants,
    "small": small,
    "counted": counted,
    "peers": peers,
    "linear": linear,
    "topk": topk,
    "divergences": divergences,
    "sanitized": sanitized,
}


def main(args: argparse.Namespace) -> int:
    # What the last contest takes is not known before: a little time for it is kept.
    deadline = time.monotonic() + args.seconds * 0.9 - 5
    device = "cpu" if args.dry else "cuda"
    place = Place(args.output.resolve() / "lines.jsonl", device, args.dry, deadline)
    STEPS[args.name](place, *args.words)
    return 0
