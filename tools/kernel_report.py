#!/usr/bin/env python3
"""Static counts of our GPU kernels beside the peers': ``make kernel-report``. Needs no GPU.

    python tools/kernel_report.py [--target sm_90] [--markdown] [--targets]

Per element means per column of a row, summed over the sweeps; el is elements per thread and loop
trip. ``--targets`` compiles a few problems for every target and prints registers and spills. The
CUDA kernels follow (:mod:`cuda_counts`), whose loops are unrolled and whose bytes are executed.

Another backend joins by a function like :func:`triton_entries` in PROVIDERS.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
from collections.abc import Iterator
from typing import Any

import cuda_counts
import sass
import torch
import triton

from kdkernels.backends import BACKENDS
from kdkernels.backends.triton import launch, offline, policy
from kdkernels.problem import Options, Problem

BF16, F32 = torch.bfloat16, torch.float32
KL_CE: dict[str, Any] = {"alpha": 0.5, "reduction": "sum"}
#: name -> (vocab, student dtype, teacher dtype, options, mode)
PROBLEMS: dict[str, tuple[int, torch.dtype, torch.dtype, dict[str, Any], str]] = {
    "KL + CE + grad, T=1": (128256, BF16, BF16, KL_CE, "forward"),
    "KL + CE + grad, T=1, V=50257": (50257, BF16, BF16, KL_CE, "forward"),
    "KL + CE + grad, T=2": (128256, BF16, BF16, KL_CE | {"temperature": 2.0}, "forward"),
    "KL + CE + grad, T=1.7": (128256, BF16, BF16, KL_CE | {"temperature": 1.7}, "forward"),
    "KL + CE + grad, float32": (128256, F32, F32, KL_CE, "forward"),
    "KL + CE + grad, bf16 / float32": (128256, BF16, F32, KL_CE, "forward"),
    "KL + CE, loss only": (128256, BF16, BF16, KL_CE, "loss"),
    "KL + CE, recomputed gradient": (128256, BF16, BF16, KL_CE, "recompute"),
    "reverse KL + CE + grad": (128256, BF16, BF16, KL_CE | {"divergence": "reverse_kl"}, "forward"),
    "TVD + CE + grad": (128256, BF16, BF16, KL_CE | {"divergence": "tvd"}, "forward"),
    "JSD + CE + grad": (
        128256, BF16, BF16, KL_CE | {"divergence": "jsd", "parameters": (0.5,)}, "forward"
    ),
    "skew KL + CE + grad": (
        128256, BF16, BF16,
        KL_CE | {"divergence": "skew_forward_kl", "parameters": (0.1,)}, "forward",
    ),
    "alpha-beta + CE + grad": (
        128256, BF16, BF16,
        KL_CE | {"divergence": "alpha_beta", "parameters": (0.2, 0.7)}, "forward",
    ),
    "KL + CE + grad, softcap, smoothing, z-loss, T=2": (
        128256, BF16, BF16,
        KL_CE | {
            "temperature": 2.0, "student_softcap": 30.0, "teacher_softcap": 30.0,
            "label_smoothing": 0.1, "z_loss": 1e-4,
        }, "forward",
    ),
}  # fmt: skip

#: Peers on the same shape and target, counted once by ../shared/tools/static_sass.py (Triton 3.7.0;
#: liger-kernel, fla, speculators and Fast-LLM as named in ../shared/design/GPU-KERNELS.md).
PEERS = (
    ("Liger kl_div fwd (prob target)", "16384/16", 32, 32, 0, 4, "8x128", 3, 0.0, 33.4),
    ("Liger cross_entropy fwd+grad", "32768/32", 32, 64, 0, 1, "4x128 / 4x128", 6, 2.09, 24.2),
    ("Liger jsd beta=0.5 (from log-probs)", "4096/4", 32, 80, 0, 6, "8x128", 8, 4.0, 66.2),
    ("fla kl_div_kernel, loss+grad", "32768/32", 32, 64, 0, 1, "8x128 / 8x128", 15, 4.06, 48.9),
    ("speculators kl fwd + bwd", "4096/8", 16, 32, 0, 8, "2 / 2 / 4 / 4 x128", 15, 5.12, 68.7),
    ("fla KL + Liger CE (KL + CE + grad)", "32768/32", 32, 64, 0, 1, "all x128", 21, 6.15, 73.1),
    ("the same, V=50257", "32768/32", 32, 64, 30, 1, "96x16", 21, 6.15, 98.0),
)
HEAD = (
    "kernel", "tile/warps", "el", "regs", "spill ops", "programs/SM", "loads n x bits", "barriers",
    "MUFU/el", "instr/el", "bytes/el",
)  # fmt: skip


@dataclasses.dataclass
class Entry:
    """One compiled row kernel and how to count it."""

    name: str
    kernel: sass.Kernel
    tile: int  # columns of one loop trip of one program
    warps: int
    logit_bytes: int  # of one column, both models
    gradient_bytes: int


def make_problem(
    vocab: int, student: torch.dtype, teacher: torch.dtype, options: dict[str, Any],
    rows: int = 8192,
) -> Problem:  # fmt: skip
    """A problem without memory: only shapes, dtypes and strides matter to a compiler."""
    return Problem(
        torch.empty(rows, vocab, dtype=student, device="meta"),
        torch.empty(rows, vocab, dtype=teacher, device="meta"),
        torch.empty(rows, dtype=torch.int64, device="meta"),
        None,
        None,
        Options(**options),
    )


def compile_rows(problem: Problem, mode: str, target: str) -> list[offline.Compiled]:
    """The launches of the row kernel for a problem: ``forward``, ``loss`` or ``recompute``."""
    gpu = offline.TARGETS[target]
    architecture = gpu.arch if gpu.backend == "cuda" else 0
    device = policy.H100._replace(kind=gpu.backend, architecture=architecture, warp=gpu.warp_size)
    with offline.compiling(gpu) as launches:
        if mode == "recompute":
            kept = BACKENDS["triton"].statistics_rows
            statistics = torch.empty(kept, problem.rows, device="meta")
            upstream = torch.empty((), device="meta")
            launch.backward(problem, statistics, upstream, device=device)
        else:
            launch.forward(problem, want_gradient=mode == "forward", extras=False, device=device)
    return [one for one in launches if one.name == "kd_rows"]


def triton_entries(target: str) -> Iterator[Entry]:
    for name, (vocab, student, teacher, options, mode) in PROBLEMS.items():
        problem = make_problem(vocab, student, teacher, options)
        (compiled,) = compile_rows(problem, mode, target)
        (kernel,) = sass.read(compiled.kernel.asm["cubin"])
        tile = compiled.variant.tile.columns
        sizes = (student.itemsize, teacher.itemsize)
        gradient = 0 if mode == "loss" else student.itemsize
        yield Entry("kdkernels " + name, kernel, tile, compiled.num_warps, sum(sizes), gradient)


PROVIDERS = (triton_entries,)


@dataclasses.dataclass
class Counts:
    """Sums over the sweeps, per element."""

    mufu: float = 0.0
    instructions: float = 0.0
    bytes: float = 0.0
    barriers: int = 0


def count(entry: Entry) -> Counts:
    elements = entry.tile / (32 * entry.warps)
    counts = Counts()
    for loop in entry.kernel.loops:
        # The compiler may have unrolled a loop: its loads tell how often.
        trips = elements * max(1.0, loop.load_bytes / (elements * entry.logit_bytes))
        counts.mufu += loop.mufu / trips
        counts.instructions += loop.instructions / trips
        counts.bytes += (loop.load_bytes + loop.store_bytes) / trips
        counts.barriers += loop.barriers
    return counts


def row(entry: Entry, architecture: int) -> tuple[Any, ...]:
    kernel, counts = entry.kernel, count(entry)
    loads = " / ".join(
        " ".join(f"{n}x{bits}" for bits, n in sorted(loop.loads.items())) for loop in kernel.loops
    )
    return (
        entry.name,
        f"{entry.tile}/{entry.warps}",
        f"{entry.tile / (32 * entry.warps):g}",
        kernel.registers,
        kernel.whole.spills,
        sass.resident(kernel.registers, 32 * entry.warps, architecture=architecture),
        loads,
        counts.barriers,
        f"{counts.mufu:.2f}",
        f"{counts.instructions:.1f}",
        f"{counts.bytes:g}",
    )


def amd_numbers(assembly: str) -> str:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    wide = len(re.findall(r"load_dwordx4", assembly))
    return (
        f"{found['vgpr_count']} VGPRs, {found['vgpr_spill_count']} VGPR spills, "
        f"{scratch[1] if scratch else '?'} B scratch, {wide} 16-byte loads"
    )


def print_targets() -> None:
    """Registers and spills of every problem on every target."""
    for target in offline.TARGETS:
        for name, (vocab, student, teacher, options, mode) in PROBLEMS.items():
            problem = make_problem(vocab, student, teacher, options)
            (compiled,) = compile_rows(problem, mode, target)
            if target.startswith("gfx"):
                numbers = amd_numbers(compiled.kernel.asm["amdgcn"])
            else:
                (kernel,) = sass.read(compiled.kernel.asm["cubin"])
                narrow = min((min(loop.loads) for loop in kernel.loops), default=0)
                numbers = (
                    f"{kernel.registers} registers, {kernel.whole.spills} spills, narrowest load "
                    f"in a loop {narrow} bits"
                )
            print(f"{target:7} {name:50} {numbers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", default="sm_90", choices=[t for t in offline.TARGETS if "sm" in t]
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true")
    form.add_argument("--targets", action="store_true", help="registers and spills everywhere")
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}, Triton {triton.__version__}, {arguments.target}, 8192 rows")
    if arguments.targets:
        print_targets()
        return
    entries = (entry for provider in PROVIDERS for entry in provider(arguments.target))
    table = [row(entry, int(arguments.target[3:])) for entry in entries]
    if arguments.target == "sm_90":
        table += [(*peer, "") for peer in PEERS]
    lines = [tuple(map(str, line)) for line in (HEAD, *table)]
    if arguments.markdown:
        lines.insert(1, ("---",) * len(HEAD))
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    else:
        print_columns(lines)
    print()
    cuda_counts.print_traffic()
    print()
    cuda_counts.print_code(arguments.target[3:])


def print_columns(lines: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )


if __name__ == "__main__":
    main()
