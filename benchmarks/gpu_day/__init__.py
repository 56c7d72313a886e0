"""A day on a GPU machine: everything that only a device can prove or measure, in two halves.

The machine has a GPU, nvcc and torch, but no network and none of this project's environment, and
it may be lent for minutes. So ``plan`` runs the most valuable first, each step in a process of its
own with a time box, and every result is a line on disk as soon as there is one. ``steps`` is what
runs in those processes: the suite's own workloads, providers and measure. ``prepare`` fills
``.gpu/``, which travels along, where there is a network.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from . import plan, prepare, steps

#: What is to be brought back: few and small files.
OUTPUT = Path("outputs/gpu-day")


def seconds(text: str) -> float:
    """The finite number above 0 that ``text`` is."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-day", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="fill .gpu/ (needs a network; nvcc for the native module)")
    for half in plan.HALVES:
        add = commands.add_parser(half, help=", ".join(s.name for s in plan.HALVES[half]))
        add.add_argument("--limit", type=seconds, default=plan.LIMIT, help="seconds (%(default)s)")
        add.add_argument("--only", default="", help="comma-separated names of steps")
    add = commands.add_parser("step", help="one step in this process")
    add.add_argument("name", choices=steps.STEPS)
    add.add_argument("words", nargs="*")
    add.add_argument("--seconds", type=float, default=3600.0)
    for add in commands.choices.values():
        add.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
        add.add_argument("--dry", action="store_true", help="rehearse on CPUs with tiny shapes")
    args = parser.parse_args(arguments)
    if args.command == "prepare":
        return prepare.main()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.command == "step":
        return steps.main(args)
    return plan.run(args.command, args.output.resolve(), args.limit, args.dry, args.only)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
