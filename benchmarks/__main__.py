"""``python -m benchmarks``: run the suite. ``python -m benchmarks report FILE``: its report again.
``python -m benchmarks gpu-day``: prove and measure everything on a machine with a GPU.

The JSON, the table and the plots go to ``--output``. A second process, with an allocator that keeps
freed blocks, runs the ``retain`` workloads; memory is measured in one process per provider.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from kdkernels.linear import MAX_CHUNK_BYTES

from . import gpu_day, machine, measure, memory, record, report, workloads
from .providers import PROVIDERS, Provider, unasked
from .workloads import Workload

#: glibc keeps freed blocks of any size: no call pays for fresh pages.
RETAIN = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
#: Peak memory is measured on these, and on the ``linear_memory`` group.
MEMORY_WORKLOADS = ("kd_ce/fp32/V32000/T2", "kd_ce/bf16/V32000/T2", "kd_ce/bf16/V151936/T2")


def positive(text: str) -> int:
    """The whole number above 0 that ``text`` is; what argparse reports otherwise."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--workloads", default="", help="comma-separated names or patterns, see --list")
    add("--providers", default="", help="comma-separated names, see --list")
    add("--quick", action="store_true", help="a few workloads of 8M logits, under two minutes")
    add("--rounds", type=positive, help="samples per contender (default 11, quick: 7)")
    add("--threads", type=positive, default=torch.get_num_threads())
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--output", type=Path, default=Path("outputs/benchmarks"), metavar="DIR")
    add("--no-memory", action="store_true", help="skip the memory measurement")
    add("--list", action="store_true", help="print workloads and providers and exit")
    add("--stem", default="", help=argparse.SUPPRESS)
    add("--allocator", default="", choices=["", "default", "retain"], help=argparse.SUPPRESS)
    return parser


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _providers(names: str, device: str) -> list[Provider]:
    if not names:
        return unasked(device)
    unknown = set(names.split(",")) - set(PROVIDERS)
    if unknown:
        raise ValueError(f"--providers: {sorted(unknown)} not in {', '.join(PROVIDERS)}")
    return [PROVIDERS[name] for name in names.split(",")]


def _contests(
    run: record.Run, chosen: list[Workload], providers: list[Provider], args: argparse.Namespace
) -> None:
    for index, workload in enumerate(chosen):
        start = time.perf_counter()
        contest = measure.contest(
            workload, providers, args.rounds, args.device, index, peaks=run.memory
        )
        run.contests.append(contest)
        bad = [e for e in contest.entries.values() if e.status in ("wrong", "failed")]
        notes = "".join(f"; {e.provider} {e.status}: {e.reason}" for e in bad)
        seconds = time.perf_counter() - start
        _progress(f"[{index + 1}/{len(chosen)}] {workload.name}: {seconds:.1f} s{notes}")


def _retained(run: record.Run, chosen: list[Workload], args: argparse.Namespace) -> None:
    """Run the ``retain`` workloads in a process whose allocator keeps freed blocks."""
    names = ",".join(w.name for w in chosen)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "--allocator=retain", f"--workloads={names}"]
        command += [f"--rounds={args.rounds}", f"--threads={args.threads}", "--stem=retain"]
        command += [f"--providers={args.providers}", f"--output={folder}"]
        command += ["--quick"] if args.quick else []
        subprocess.run(command, env={**os.environ, **RETAIN}, check=True, stdout=subprocess.DEVNULL)
        run.contests += record.load(Path(folder) / "retain.json").contests


def _memory(
    run: record.Run, chosen: list[Workload], providers: list[Provider], args: argparse.Namespace
) -> None:
    names = MEMORY_WORKLOADS[:1] if args.quick else MEMORY_WORKLOADS
    for workload in (w for w in chosen if w.name in names or not w.timed):
        for provider in providers:
            if provider.family != "kernel" and provider.absence(workload) is None:
                found = memory.in_subprocess(provider.name, workload, args.device, args.threads)
                run.memory.append(found)
        _progress(f"memory of {workload.name}")


def _begin(args: argparse.Namespace) -> tuple[record.Run, list[Workload], list[Provider]]:
    """A run without results, and who takes part in what; ValueError if that cannot be."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: 'cuda' is not here: torch sees no CUDA device")
    args.rounds = args.rounds or (7 if args.quick else 11)
    torch.set_num_threads(args.threads)
    providers = _providers(args.providers, args.device)
    patterns = [p for p in args.workloads.split(",") if p]
    chosen = workloads.chosen(workloads.suite(args.quick, args.device), patterns)
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    options["max_chunk_bytes"] = MAX_CHUNK_BYTES
    run = record.Run(machine.describe(args.device), machine.versions(args.device), options)
    return run, chosen, providers


def _execute(
    run: record.Run, chosen: list[Workload], providers: list[Provider], args: argparse.Namespace
) -> None:
    """The whole run; every sample goes into ``run``."""
    inside = args.allocator or "default"
    here = [w for w in chosen if w.allocator == inside]
    if not args.allocator:
        run.bandwidth = machine.bandwidth(args.threads, args.device)
    _contests(run, [w for w in here if w.timed], providers, args)
    if not args.allocator:
        retained = [w for w in chosen if w.allocator == "retain"]
        if retained and args.device == "cpu":
            _retained(run, retained, args)
        if not args.no_memory and args.device == "cpu":
            _memory(run, here, providers, args)
        # Again at the end: the machine may have been busier, or quieter, at the start.
        run.bandwidth += machine.bandwidth(args.threads, args.device)


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report")
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, help="folder (default: that of the file)")
    args = parser.parse_args(arguments)
    folder = args.output or args.file.parent
    try:
        run = record.load(args.file)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return _refuse(error)
    _print(*report.write(run, folder, args.file.stem))
    return 0


def _refuse(error: Exception) -> int:
    print(error, file=sys.stderr)
    return 2


def _print(text: str, written: list[Path]) -> None:
    print(text)
    _progress("written: " + ", ".join(map(str, written)))


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["report"]:
        return _report(arguments[1:])
    if arguments[:1] == ["gpu-day"]:
        return gpu_day.main(arguments[1:])
    args = _parser().parse_args(arguments)
    if args.list:
        print("\n".join(w.name for w in workloads.suite(args.quick, args.device)))
        print("providers:", ", ".join(PROVIDERS))
        return 0
    try:
        run, chosen, providers = _begin(args)
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return _refuse(error)
    stem = args.stem or run.versions["date"].replace(":", "").split("+")[0]
    path = args.output / f"{stem}.json"
    try:
        _execute(run, chosen, providers, args)
    finally:
        run.save(path)  # what was measured before an end that came early, too
    text, written = report.write(run, args.output, stem)
    _print(text, [path, *written])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
