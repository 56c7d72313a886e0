#!/usr/bin/env python3
"""No function of more than 60 lines or 12 parameters, in any language: a part of ``make lint``.

Python's complexity is ruff's to limit; this counts what it cannot: lines, and C++ and CUDA. Exempt
are the public signatures, which are written out, and the entry of Triton's row kernel, since Triton
would compile a variant for every kind of number that it finds in a tuple.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lizard

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kdkernels", "csrc", "benchmarks", "tests", "tools", "examples", "setup.py")
PYTHON, CPP = (".py",), (".h", ".cpp", ".cu", ".cuh", ".inc")
MOST_LINES, MOST_PARAMETERS = 60, 12
EXEMPT = {"fused_kd_loss", "fused_topk_kd_loss", "fused_linear_kd_loss", "kd_rows"}


def excesses(path: Path) -> list[str]:
    """What is too long in this file, in words."""
    # The parser goes by the suffix, and knows neither .inc nor CUDA's.
    name = str(path.with_suffix(".cpp")) if path.suffix in CPP else str(path)
    found = lizard.analyze_file.analyze_source_code(name, path.read_text(encoding="utf-8"))
    return [
        f"{path.relative_to(ROOT)}:{function.start_line}: {function.name} has {function.length} "
        f"lines and {function.parameter_count} parameters"
        for function in found.function_list
        if function.length > MOST_LINES or function.parameter_count > MOST_PARAMETERS
        if function.name.rpartition(".")[2] not in EXEMPT
    ]


def main() -> int:
    files = [
        path
        for folder in FOLDERS
        for path in sorted([ROOT / folder, *(ROOT / folder).rglob("*")])
        if path.suffix in (*PYTHON, *CPP)
    ]
    found = [line for path in files for line in excesses(path)]
    print("\n".join(found) or f"{len(files)} files: no function is too long")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
