"""The command line: ``kdkernels distill | sweep | cache-teacher | init-student | ...``.

Exit code 0: done; 1: begun, and something went wrong, which is said; 2: bad input, one line on
stderr, nothing written. transformers is imported only by the commands that load models.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import logging
import os
import platform
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from .._version import __version__
from ..backends import native
from ..dispatch import available_backends
from . import tune

if TYPE_CHECKING:
    from .experiment import Experiment

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_EPILOG = """examples:
  kdkernels info
  kdkernels fetch smollm2
  kdkernels distill examples/smollm2.yaml
  kdkernels distill examples/minilm.yaml
  kdkernels distill examples/smollm2.yaml --alpha 0.7 --output_dir out
  kdkernels sweep config.yaml --sweep_temperatures 1 2 4 --sweep_steps 40 --output_dir out
  kdkernels init-student --teacher FOLDER --layers uniform:3 --output_dir student
  kdkernels cache-teacher config.yaml --teacher_cache cache --cache_top_k 64
  kdkernels cache-teacher config.yaml --teacher_cache cache --cache_samples 50
  kdkernels distill --teacher FOLDER --student_layers 0-5 --train_text notes.txt --output_dir out
  kdkernels distill --teacher_url http://localhost:8000/v1 --student FOLDER --train_text notes.txt
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        return _run_command(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("\nkdkernels: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        from ..training.redaction import redacted

        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return FAILED


def _run_command(arguments: list[str]) -> int:
    if arguments[:1] == ["distill"]:  # its options are dataclasses that need transformers
        return distill(arguments[1:])
    if arguments[:1] == ["cache-teacher"]:
        return cache(arguments[1:])
    if arguments[:1] == ["sweep"]:
        return sweep(arguments[1:])
    parser = _Parser(
        prog="kdkernels",
        description="Fused knowledge-distillation losses, and distillation of language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kdkernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="", required=True)
    commands.add_parser(
        "distill", help="train a small language model from a large one (distill --help)"
    )
    commands.add_parser(
        "cache-teacher",
        help="write the teacher's outputs for a run into --teacher_cache; options as for distill",
    )
    commands.add_parser(
        "sweep", help="find temperature, alpha and divergence on a short budget (sweep --help)"
    )
    student_parser = commands.add_parser(
        "init-student", help="make a student from a teacher's layers, in a folder"
    )
    _student_options(student_parser)
    fetch_parser = commands.add_parser("fetch", help="download what a demo needs; prints its paths")
    fetch_parser.add_argument("demo", choices=["smollm2", "minilm"])
    fetch_parser.set_defaults(command=lambda options: fetch(options.demo))
    info_parser = commands.add_parser(
        "info", help="versions, processor, and which backends can run"
    )
    info_parser.set_defaults(command=lambda _: info())
    tune_parser = commands.add_parser("tune", help="measure the Triton kernels on this GPU")
    tune.add_arguments(tune_parser)
    tune_parser.set_defaults(command=measure)
    namespace = parser.parse_args(arguments)
    return int(namespace.command(namespace))


class _Parser(argparse.ArgumentParser):
    """argparse with errors in one line."""

    def error(self, message: str) -> NoReturn:
        from ..training.redaction import redacted

        told = redacted(" ".join(message.split()))
        self.exit(BAD_INPUT, f"{self.prog}: error: {told} (see --help)\n")


def _refuse(command: str, error: Exception) -> int:
    """One line about what is wrong with the input."""
    message = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | RuntimeError):  # others do not explain
        message = f"{type(error).__name__}: {message}"
    _say_error(command, message)
    return BAD_INPUT


def _say_error(command: str, message: str) -> None:
    from ..training.redaction import redacted

    if os.environ.get("RANK", "0") == "0":
        print(f"kdkernels {command}: error: {redacted(message)}", file=sys.stderr)


# ---- info, fetch --------------------------------------------------------------------------------


def info() -> int:
    """Print versions, the processor, and for each backend whether it can run here or why not."""
    print(f"kdkernels  {__version__}")
    print(f"torch      {torch.__version__}")
    print(f"python     {platform.python_version()} ({sys.executable})")
    print(f"cpu        {_processor()}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"kernels    {_instruction_set()}")
    print(f"threads    {torch.get_num_threads()}")
    for index in range(torch.cuda.device_count()):
        print(f"gpu {index}      {torch.cuda.get_device_name(index)}")
    print("backends, in order of preference:")
    for name, reasons in available_backends().items():
        print(f"  {name:<10} {'cannot run: ' + '; '.join(reasons) if reasons else 'can run'}")
    return 0


def _instruction_set() -> str:
    """What the CPU's kernels run on, or why that cannot be."""
    try:
        return str(native.MODULE.cpu_isa()) if native.MODULE else "not built"
    except ValueError as error:
        return f"none: {error}"


def _processor() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure(options: argparse.Namespace) -> int:
    """``kdkernels tune``."""
    try:
        return tune.run(options)
    except ValueError as error:
        return _refuse("tune", error)


def fetch(demo: str) -> int:
    """Download teacher and text of a demo into the cache; prints their folders."""
    from .fetch import fetch_assets

    try:
        for folder in fetch_assets(demo):
            print(folder)
    except Exception as error:
        return _refuse("fetch", error)
    return 0


# ---- sweep, init-student, cache-teacher ---------------------------------------------------------


def sweep(arguments: list[str]) -> int:
    """``kdkernels sweep [config.yaml] [--sweep_temperatures 1 2 4] [--option value ...]``."""
    _quiet_libraries()
    from . import sweep as trials
    from .experiment import prepare

    try:
        model, data, run, args, settings, chosen = parse(
            arguments, "sweep", [trials.SweepArguments]
        )
        experiment = prepare(model, data, run, args, chosen, trials.check_folder)
        trials.check(experiment, settings)
        trials.trials_before(experiment)
        experiment.reach_teacher()
        trials.rehearse(experiment, settings)
    except Exception as error:
        return _refuse("sweep", error)
    if experiment.args.process_index == 0:
        print(_headline(experiment), file=sys.stderr)
    with _log_shown():
        if not _filled("sweep", experiment):
            return FAILED
        outcome = trials.run(experiment, settings)
    if experiment.args.process_index == 0:
        print(f"\n{trials.table(outcome)}\n")
        print(f"{outcome['seconds']:.0f} s; best.yaml and sweep.png in {experiment.output}")
    for problem in outcome["problems"]:
        _say_error("sweep", problem)
    return FAILED if outcome["problems"] else 0


def _student_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="a folder, a hub name, or a .gguf file")
    parser.add_argument(
        "--layers",
        required=True,
        help="layers to keep, e.g. 0,1,5-7, or a number of them: uniform:3",
    )
    parser.add_argument("--task", default="causal-lm", help="what the model is for")
    parser.add_argument("--dtype", default="float32", help="of the weights; auto: the teacher's")
    parser.add_argument("--output_dir", required=True, help="folder to be made")
    parser.set_defaults(command=init_student)


def init_student(options: argparse.Namespace) -> int:
    """``kdkernels init-student --teacher X --layers 0,2,5 --output_dir OUT``."""
    _quiet_libraries()
    from ..training.layer_configs import layer_count
    from ..training.models import parameter_count
    from .init_student import make_student

    try:
        student = make_student(
            options.teacher,
            options.layers,
            Path(options.output_dir),
            task=options.task,
            dtype=options.dtype,
        )
    except Exception as error:
        return _refuse("init-student", error)
    layers, size = layer_count(student.config, "layers"), parameter_count(student) / 1e6
    print(f"{options.output_dir}: {layers} layers, {size:.1f} M parameters")
    return 0


def cache(arguments: list[str]) -> int:
    """``kdkernels cache-teacher [config.yaml] --teacher_cache FOLDER [--option value ...]``."""
    _quiet_libraries()
    from ..training.served import FillError
    from .cache_teacher import write_cache

    try:
        with _log_shown():
            info = write_cache(*parse(arguments, "cache-teacher"))
    except FillError as error:
        _say_error("cache-teacher", str(error))
        return FAILED
    except Exception as error:
        return _refuse("cache-teacher", error)
    kept = info.kept if info.is_full else f"{info.kept} at T = {info.temperature}"
    print(f"{info.examples} examples, {info.rows} rows, {kept} of {info.vocab}")
    return 0


# ---- distill ------------------------------------------------------------------------------------


def distill(arguments: list[str]) -> int:
    """``kdkernels distill [config.yaml] [--option value ...]``."""
    _quiet_libraries()
    from . import report
    from .distill import run
    from .experiment import prepare
    from .rehearsal import rehearse

    try:
        experiment = prepare(*parse(arguments))
        experiment.reach_teacher()
        rehearse(experiment)
    except Exception as error:  # whatever a library raises about what it is given
        return _refuse("distill", error)
    if experiment.args.process_index == 0:
        print(_headline(experiment), file=sys.stderr)
    with _log_shown():
        if not _filled("distill", experiment):
            return FAILED
        outcome = run(experiment)
    if experiment.args.process_index == 0:
        print(f"\n{report.table(outcome['rows'])}\n\n{report.legend(outcome['rows'])}")
        print(f"{outcome['seconds']:.0f} s; results in {experiment.args.output_dir}")
    for problem in outcome["problems"]:
        _say_error("distill", problem)
    return FAILED if outcome["problems"] else 0


def _filled(command: str, experiment: Experiment) -> bool:
    """Whether a served teacher has answered for all texts; what is in the way is said."""
    try:
        experiment.fill_teacher()
    except (ValueError, RuntimeError, OSError) as error:
        _say_error(command, " ".join(str(error).split()))
        return False
    return True


def parse(
    arguments: list[str], command: str = "distill", others: Sequence[Any] = ()
) -> tuple[Any, ...]:
    """Options of ``distill`` -> the arguments of ``prepare``; ValueError if one is bad.

    ``others``: further classes of options, whose objects come before the last result.
    """
    from transformers import HfArgumentParser

    from ..training.arguments import DistillationArguments
    from .experiment import DataArguments, ModelArguments, RunArguments

    class Parser(_Parser, HfArgumentParser):
        chosen: dict[str, Any]

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            """Also keeps the options that differ from their defaults."""
            found, unknown = super().parse_known_args(args, namespace)
            options = vars(found).items()
            self.chosen = {name: v for name, v in options if v != self.get_default(name)}
            return found, unknown

    kinds: list[Any] = [ModelArguments, DataArguments, RunArguments, DistillationArguments, *others]
    parser = Parser(
        kinds,
        prog=f"kdkernels {command}",
        usage=f"kdkernels {command} [config.yaml] [--option value ...]",
        description="Train a student on a teacher. A YAML file holds the same options as the "
        "command line, which overrides it. Relative paths are relative to the working directory.",
        allow_abbrev=False,
    )
    fields = {f.name: f for kind in kinds for f in dataclasses.fields(kind) if f.init}
    options, config = list(arguments), None
    if options and not options[0].startswith("-"):
        config = options[0]
        options[:1] = yaml_options(Path(config), fields)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        options, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_unknown("option", unknown[0], [f"--{name}" for name in fields]))
    for options_of in parsed:
        if isinstance(options_of, RunArguments):
            options_of.config_file = config
    return (*parsed, parser.chosen)


def yaml_options(path: Path, fields: dict[str, dataclasses.Field[Any]]) -> list[str]:
    """The options that a YAML file holds, as command-line words; null leaves the default."""
    import yaml

    if not path.is_file():
        raise ValueError(f"config: {str(path)!r} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {str(path)!r} is not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: {str(path)!r} does not hold `option: value` lines")
    words: list[str] = []
    for name, value in content.items():
        if name not in fields:
            raise ValueError(f"config {str(path)!r}: {_unknown('key', str(name), list(fields))}")
        if value is not None:
            words += _words(name, value, takes_list="list" in str(fields[name].type))
    return words


def _words(name: str, value: Any, takes_list: bool) -> list[str]:
    if isinstance(value, list) and takes_list:
        return [f"--{name}", *map(str, value)]
    if isinstance(value, list):
        parts = (":".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
        value = ",".join(parts)
    elif isinstance(value, dict):
        value = json.dumps(value)
    return [f"--{name}={value}"]


def _unknown(kind: str, given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given.partition("=")[0], known, n=1)
    return f"unknown {kind} {given!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _quiet_libraries() -> None:
    """Only our own progress bars: those of loading and saving hide the lines that matter."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:  # it has read the variable already
        sys.modules["datasets"].disable_progress_bars()
    from transformers.utils import logging

    logging.disable_progress_bar()


class _Lines(logging.Handler):
    """Writes each line to stderr the first time it comes: every training of a run says the same."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self.seen:
            self.seen.add(line)
            print(line, file=sys.stderr)


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    """While this is open, what the package logs for information is seen by the user."""
    logger, lines = logging.getLogger("kdkernels"), _Lines()
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(lines)


def _headline(experiment: Experiment) -> str:
    """What is about to be trained, in one line."""
    from ..training.models import parameter_count

    corpus, args = experiment.corpus, experiment.args
    half = experiment.teacher.dtype in (torch.bfloat16, torch.float16)
    slow = half and args.device.type == "cpu" and args.teacher_device is None
    note = "\nnote: half precision is slow on many CPUs; consider --teacher_dtype float32"
    unlabelled = "\nnote: train_text has no labels, so there is no baseline that learns them"
    return (
        f"{experiment.teacher}, student {parameter_count(experiment.student) / 1e6:.1f} M "
        f"parameters; {corpus.train.tokens} training tokens, {corpus.validation.tokens} held out"
        + (note if slow else "")
        + "".join(f"\nnote: {told}" for told in experiment.notes)
        + (unlabelled if experiment.lacks_labels and experiment.run_args.baseline else "")
    )
