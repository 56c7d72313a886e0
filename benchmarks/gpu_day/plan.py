"""What runs in which order, in which time, and what is said of it at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .. import record, report

ROOT = Path(__file__).resolve().parents[2]
#: Ignored by git; see ``prepare``.
CARRIED = ROOT / ".gpu"
#: Seconds of a half, and what the report at its end needs of them.
LIMIT = 340.0
_REPORT_SECONDS = 8.0
#: Less than this is not worth a process that imports torch.
_LEAST_SECONDS = 8.0
_LOG_BYTES = 200_000

_COUNTERS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors_op_read.sum",
    "lts__t_sectors_op_write.sum",
    "gpu__time_duration.sum",
    "sm__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
)


@dataclass(frozen=True)
class Step:
    """One process.

    name: of a function in ``steps``, with words for it after colons.
    seconds: at most so many, and at most what is left of the half.
    before: a program (a profiler, a sanitizer) under which the step's process runs.
    tests: arguments of pytest, which is the process then; ``rehearsed`` are those of a rehearsal.
    rehearse: whether a rehearsal runs it, and not only its like.
    gate: whether its failure is one of the whole half.
    beside: runs beside what follows, until a step wants the machine for itself (``alone``).
    """

    name: str
    seconds: float
    before: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    rehearsed: tuple[str, ...] = ()
    rehearse: bool = True
    gate: bool = True
    beside: bool = False
    alone: bool = False
    tail: int = 2

    def command(self, output: Path, seconds: float, dry: bool) -> list[str]:
        if self.tests:
            given = self.rehearsed if dry else self.tests
            return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *given]
        name, *words = self.name.split(":")
        own = [sys.executable, "-m", "benchmarks", "gpu-day", "step", name, *words]
        own += [f"--output={output}", f"--seconds={seconds:.0f}", *(["--dry"] if dry else [])]
        # A CPU has neither NVIDIA's profiler nor its sanitizer: what runs under them is rehearsed.
        before = () if dry else self.before
        return [part.format(output=output) for part in before] + own


def _sanitized(tool: str) -> Step:
    # racecheck knows bulk copies and mbarriers only in part: all are read, none is a gate.
    before = ("compute-sanitizer", "--tool", tool, "--print-limit", "20")
    rehearse = tool == "memcheck"  # without the tools they are all the same
    return Step(f"sanitized:{tool}", 45, before, rehearse=rehearse, gate=False, tail=4)


#: One line a test, for a run whose time ends before its summary.
_PYTEST = ("-vvv", "-n", "14", "--maxfail=20")


def _of_both_backends(name: str, seconds: float, file: str, rehearsed: str) -> Step:
    path = f"tests/loss/test_{file}.py"
    tests = (*_PYTEST, path, "-k", "cuda or triton")
    return Step(name, seconds, tests=tests, rehearsed=(path, "-k", rehearsed), tail=4)


HALVES: dict[str, tuple[Step, ...]] = {
    "first": (
        Step("native", 120),
        # Triton's kernels take a second or two each to compile.
        Step("warm", 90, beside=True),
        Step("clusters", 40, gate=False, tail=20),
        # A process a kernel: one that hangs ends with its time, and names itself.
        *(Step(f"smoke:{kernel}", 40) for kernel in ("registers", "shared", "stream", "default")),
        Step("ceilings", 30, alone=True, tail=8),
        Step("own", 80, alone=True),
        Step("variants", 65, alone=True),
        Step("small", 50, alone=True),
        Step(
            "counted",
            50,
            (
                *("ncu", "--clock-control", "none", "-f", "--csv"),
                *("--log-file", "{output}/ncu.csv", "--metrics", ",".join(_COUNTERS)),
                *("-k", "regex:register_kernel|resident_kernel|stream_kernel|kd_rows"),
                *("--launch-count", "24"),
            ),
            gate=False,
            alone=True,
        ),
    ),
    "second": (
        Step("native", 120),
        Step(
            "tests",
            80,
            tests=("-m", "gpu", *_PYTEST, "tests"),
            rehearsed=("-m", "gpu", "--collect-only", "tests"),
            tail=10,
        ),
        _of_both_backends("sparse", 45, "topk", "written_by_hand and cpu and bucket"),
        Step("topk", 30, alone=True),
        Step("peers", 90, alone=True),
        Step("linear", 65, alone=True),
        _of_both_backends("matrix", 50, "matrix", "accurate and cpu-forward and sum"),
        *(_sanitized(tool) for tool in ("memcheck", "synccheck", "racecheck")),
        Step("divergences", 40, alone=True),
    ),
}


class _Day:
    """A half that is under way: its clock, its files, what is said."""

    def __init__(self, output: Path, limit: float, dry: bool) -> None:
        self.output, self.dry = output, dry
        self.began, self.limit = time.monotonic(), limit
        self.beside: list[tuple[Step, subprocess.Popen[bytes], Path, float]] = []
        self.failed: list[str] = []
        caches = Path(tempfile.gettempdir()) / "kdkernels-gpu-day"
        caches.mkdir(exist_ok=True)
        self.logs = Path(tempfile.mkdtemp(prefix="gpu-day-"))
        path = [str(ROOT), str(CARRIED / "peers"), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(part for part in path if part),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "KDKERNELS_TUNE": str(caches / "tune.json"),
        }

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return self.limit - _REPORT_SECONDS - self.elapsed()

    def say(self, text: str) -> None:
        text = f"[{self.elapsed():.0f} s] {text}"
        print(text, flush=True)
        with (self.output / "summary.txt").open("a") as file:
            file.write(text + "\n")

    def start(self, step: Step) -> None:
        # In a rehearsal nothing is timed: as many steps at once as there are cores.
        if step.alone and not self.dry:
            self.join()
        seconds = min(step.seconds, self.left())
        if self.left() < _LEAST_SECONDS:
            self.say(f"{step.name}: no time left")
            return
        log = self.logs / f"{step.name.replace(':', '-')}.log"
        environment = dict(self.environment)
        if step.tests:  # a worker a core, each with one thread
            environment["OMP_NUM_THREADS"] = "1"
        if "compute-sanitizer" in step.before:  # it looks at allocations
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        command = step.command(self.output, seconds, self.dry)
        with log.open("wb") as file:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:  # no such profiler
                self.finish(step, 127, 0.0, log, str(error))
                return
        started = (step, process, log, time.monotonic())
        if step.beside or (self.dry and step.name != "native"):
            self.beside.append(started)
            if len(self.beside) >= (os.cpu_count() or 1) and not step.beside:
                self.wait(*self.beside.pop(0))
        else:
            self.wait(*started)

    def join(self) -> None:
        """Wait for what runs beside."""
        while self.beside:
            self.wait(*self.beside.pop(0))

    def wait(self, step: Step, process: subprocess.Popen[bytes], log: Path, started: float) -> None:
        left = min(step.seconds - (time.monotonic() - started), self.left())
        try:
            code = process.wait(max(left, 0.1))
        except subprocess.TimeoutExpired:
            code = 124
        for how in (signal.SIGTERM, signal.SIGKILL):
            # Its children, too: they would be on the machine while the next step measures.
            try:
                os.killpg(process.pid, how)
                process.wait(3)
            except (ProcessLookupError, PermissionError):
                break
            except subprocess.TimeoutExpired:
                continue
        self.finish(step, code, time.monotonic() - started, log)

    def finish(self, step: Step, code: int, seconds: float, log: Path, note: str = "") -> None:
        if code and step.gate:
            self.failed.append(step.name)
        text = log.read_text(errors="replace")[-_LOG_BYTES:]
        with (self.output / "log.txt").open("a") as file:
            file.write(f"\n===== {step.name}: rc {code}, {seconds:.0f} s\n{text}")
        ran_out = " (its time ran out)" if code == 124 else ""
        self.say(f"{step.name}: rc {code}{ran_out}, {seconds:.0f} s {note}".rstrip())
        lines = [line[:200] for line in text.splitlines() if line.strip()][-step.tail :]
        with (self.output / "summary.txt").open("a") as file:
            file.writelines(f"    {line}\n" for line in lines)
        print("".join(f"    {line}\n" for line in lines), end="", flush=True)
        outcome = {"name": step.name, "rc": code, "seconds": round(seconds, 1)}
        record.append(self.output / "lines.jsonl", "steps", outcome)


def run(half: str, output: Path, limit: float, dry: bool, only: str = "") -> int:
    """All steps of a half that its time allows; 1 if one of them failed."""
    names = only.split(",") if only else []
    steps = [s for s in HALVES[half] if s.rehearse or not dry]
    chosen = [s for s in steps if not names or s.name in names or s.name == "native"]
    unknown = set(names) - {s.name for s in steps}
    if unknown:
        print(f"--only: {sorted(unknown)} not in {', '.join(s.name for s in steps)}")
        return 2
    day = _Day(output, limit, dry)
    day.say(f"{half} half{', a rehearsal on CPUs' if dry else ''}: {limit:.0f} s, into {output}")
    for step in chosen:
        day.start(step)
    day.join()
    print(write_report(output))
    day.say(f"failed: {', '.join(day.failed)}" if day.failed else f"{half} half: all went well")
    return 1 if day.failed else 0


def write_report(output: Path) -> str:
    """What the lines say, as one JSON and as Markdown; returns the part to print."""
    lines = output / "lines.jsonl"
    found = record.collect(lines) if lines.exists() else record.Run({}, {}, {})
    if not found.versions:
        return "no step got as far as describing the machine: there is no report"
    found.save(output / "gpu-day.json")
    (output / "gpu-day.md").write_text(report.markdown(found))
    return report.digest(found)
