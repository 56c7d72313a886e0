"""Peak extra memory of one call: the high-water mark of a process that does nothing else.

CUDA's allocator counts by itself, so that on a GPU no process is needed: measure.contest asks it.

``python -m benchmarks.memory PROVIDER WORKLOAD DEVICE THREADS`` (as JSON) is that process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kdkernels import release_memory

from .providers import PROVIDERS
from .record import Memory
from .workloads import Workload

_ROOT = Path(__file__).resolve().parent.parent


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found.group(1)) * 1024


def available(device: str) -> bool:
    """Whether the high-water mark can be reset: CUDA's allocator can, a CPU process on Linux."""
    return device == "cuda" or os.access("/proc/self/clear_refs", os.W_OK)


def peak_extra(action: Callable[[], object], device: str = "cpu") -> int:
    """Bytes by which ``action`` raises the process's peak over what was resident before."""
    gc.collect()
    release_memory()  # what kdkernels keeps for the next gradient is not free of charge
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        # Blocks freed before must not serve as hidden memory of this call.
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    result = action()
    peak = _status("VmHWM")
    del result
    return peak - before


def of_provider(name: str, workload: Workload, device: str) -> int:
    """Peak extra memory of a provider's call; its first call, which loads code, does not count.

    Of many tokens that one takes minutes, and needs no more than a few.
    """
    provider = PROVIDERS[name]
    if workload.hidden:
        few = replace(workload, rows=min(workload.rows, 64))
        provider.prepare(few, few.make(device))()
    step = provider.prepare(workload, workload.make(device))
    if not workload.hidden:
        step()
    return peak_extra(step, device)


def in_subprocess(name: str, workload: Workload, device: str, threads: int) -> Memory:
    result = Memory(dict(vars(workload)), name)
    reason = PROVIDERS[name].absence(workload)
    if not available(device):
        reason = "the peak of a process cannot be reset on this system"
    if reason:
        result.status, result.reason = "skipped", reason
        return result
    command = [sys.executable, "-m", "benchmarks.memory", name, json.dumps(vars(workload)), device]
    done = subprocess.run([*command, str(threads)], cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        result.status, result.reason = "failed", lines[-1] if lines else f"rc {done.returncode}"
    else:
        result.peak_bytes = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(of_provider(sys.argv[1], Workload(**json.loads(sys.argv[2])), sys.argv[3]))
