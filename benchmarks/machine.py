"""The machine: what it is, how busy others keep it, and how fast its memory is."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import kdkernels
from kdkernels.backends import native

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "numpy", "kdkernels", "liger-kernel", "torchtune", "triton")
#: Besides them on a GPU.
_GPU_PACKAGES = ("speculators", "trl", "fla-core", "transformers")

#: Bytes of each array of the bandwidth test: many times the largest last-level cache.
_ARRAY_BYTES = 256 << 20
_GPU_ARRAY_BYTES = 1 << 30


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=_ROOT).stdout.strip()
    except OSError:
        return ""


def _caches() -> list[str]:
    root = Path("/sys/devices/system/cpu/cpu0/cache")
    fields = ("level", "type", "size", "shared_cpu_list")
    rows = (
        [_read(f"{cache}/{f}").strip() for f in fields] for cache in sorted(root.glob("index*"))
    )
    return [f"L{level} {kind} {size} (cpus {cpus})" for level, kind, size, cpus in rows]


def describe(device: str) -> dict[str, Any]:
    """CPU, instruction set in force, caches, memory, kernel, device."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.*)$", info, re.MULTILINE)
    wanted = re.compile(r"avx|fma|f16c|amx|sse4_2")
    total = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    module = native.MODULE
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "family_model": [
            int(n) for n in re.findall(r"^(?:cpu family|model)\s*:\s*(\d+)$", info, re.M)[:2]
        ],
        "cores": os.cpu_count(),
        "isa_flags": [f for f in (flags.group(1).split() if flags else []) if wanted.search(f)],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "kernel_isa": module.cpu_isa() if module else "none",
        "kernel_isa_forced": os.environ.get("KDKERNELS_CPU_ISA"),
        "kernel_build": module.build_info() if module else None,
        "caches": _caches(),
        "memory_bytes": int(total.group(1)) * 1024 if total else None,
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        "os": platform.platform(),
        "hypervisor": "hypervisor" in info,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **(_describe_gpu() if device == "cuda" else {}),
    }


def _describe_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    asked = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    answer = _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")
    describe_kernels = getattr(native.MODULE, "cuda_description", None)
    return {
        "gpu": dict(zip(asked.split(","), answer.splitlines()[0].split(", "), strict=False))
        if answer
        else {},
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cuda_kernels": describe_kernels() if describe_kernels else None,
        "backends": kdkernels.available_backends(),
    }


def versions(device: str = "cpu") -> dict[str, Any]:
    """Package versions, the commit, and whether the code measured differs from it."""
    found = {}
    for package in _PACKAGES + (_GPU_PACKAGES if device == "cuda" else ()):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {
        "python": platform.python_version(),
        **found,
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": _output(
            "git", "status", "--porcelain", "--", "kdkernels", "csrc", "benchmarks"
        ).splitlines(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


class Ticks(NamedTuple):
    """Seconds of all cores since boot, and of this process since its start."""

    wall: float
    busy: float
    steal: float
    own: float


def ticks() -> Ticks | None:
    """None where there is no /proc/stat."""
    fields = _read("/proc/stat").split("\n", 1)[0].split()[1:]
    if len(fields) < 8:
        return None
    hertz = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal = (int(f) / hertz for f in fields[:8])
    busy = user + nice + system + irq + softirq
    return Ticks(time.perf_counter(), busy, steal, time.process_time())


def disturbance(before: Ticks | None, after: Ticks | None) -> tuple[float | None, float | None]:
    """(share of the cores' time taken by other processes, share taken by the hypervisor)."""
    if before is None or after is None:
        return None, None
    capacity = max(after.wall - before.wall, 1e-9) * (os.cpu_count() or 1)
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(others / capacity, 0.0), max((after.steal - before.steal) / capacity, 0.0)


def bandwidth(threads: int, device: str, repeats: int = 7) -> list[dict[str, Any]]:
    """GB/s asked for (bytes read plus bytes written) by large copies and additions.

    ``copy`` is torch's copy, ``memcpy`` the C library's in one Python thread per core (it may write
    past the cache), ``add`` reads two arrays and writes one, which is what the loss does. On a GPU
    ``add_bf16`` does that in bfloat16, ``read`` adds an array up and ``write`` fills one.
    """
    rows = []
    for count in sorted({1, threads}) if device == "cpu" else (threads,):
        for name, moved, action in _actions(count, device):
            action()
            rates = []
            for _ in range(repeats):
                rates.append(moved / _seconds(action, device) / 1e9)
            rows.append(
                {
                    "name": name,
                    "threads": count,
                    "median": statistics.median(rates),
                    "best": max(rates),
                }
            )
    torch.set_num_threads(threads)
    return rows


def _seconds(action: Callable[[], object], device: str, calls: int = 10) -> float:
    """Of one call; on a GPU the mean of several, by its own clock."""
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            action()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def launch_microseconds(calls: int = 1000) -> float:
    """Of a kernel that does nothing worth it: what small calls pay for each launch."""
    tiny = torch.zeros(1, device="cuda")
    tiny.add_(1)
    return 1e6 * min(_seconds(lambda: tiny.add_(1), "cuda", calls) for _ in range(5))


def _actions(threads: int, device: str) -> list[tuple[str, int, Callable[[], object]]]:
    torch.set_num_threads(threads)
    size = _GPU_ARRAY_BYTES if device == "cuda" else _ARRAY_BYTES
    a, b, c = (torch.ones(size // 4, device=device) for _ in range(3))
    size = a.nbytes
    actions: list[tuple[str, int, Callable[[], object]]] = [
        ("copy", 2 * size, lambda: c.copy_(a)),
        ("add", 3 * size, lambda: torch.add(a, b, out=c)),
    ]
    if device == "cpu":
        parts = list(zip(*(np.array_split(t.numpy(), threads) for t in (c, a)), strict=True))
        pool = ThreadPoolExecutor(threads)

        def memcpy() -> None:
            list(pool.map(lambda part: np.copyto(*part), parts))

        actions.append(("memcpy", 2 * size, memcpy))
    else:
        x, y, z = (t.view(torch.bfloat16) for t in (a, b, c))
        actions += [
            ("add_bf16", 3 * size, lambda: torch.add(x, y, out=z)),
            ("read", size, lambda: a.sum()),
            ("write", size, lambda: c.fill_(1.0)),
        ]
    return actions
