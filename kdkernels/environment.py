"""The environment variables of the package: what each may hold.

Nothing imports torch here: setup.py reads its own from this file.
"""

from __future__ import annotations

import difflib
import os
import warnings

#: Every variable, and its values; None: any text.
VARIABLES: dict[str, tuple[str, ...] | None] = {
    # of a running program
    "KDKERNELS_CPU_ISA": None,  # csrc/cpu/dispatch.cpp reads and checks it
    "KDKERNELS_CUDA_KERNEL": None,  # csrc/cuda/launch.cu
    "KDKERNELS_CUDA_CLUSTER": None,  # csrc/cuda/launch.cu
    "KDKERNELS_KEEP_GRADIENT_MEMORY": ("0", "1"),
    "KDKERNELS_TUNE": None,
    "KDKERNELS_CACHE": None,
    "KDKERNELS_TEACHER_KEY": None,
    # of setup.py
    "KDKERNELS_CUDA": ("auto", "0", "1"),
    "KDKERNELS_CUDA_ARCHS": None,
    "KDKERNELS_CUDART": ("static", "shared"),
    # of the tests
    "KDKERNELS_SIMULATE": ("all",),
    "KDKERNELS_PTXSIM": None,
}


def setting(name: str) -> str | None:
    """The variable's value; None where it is not set, or empty.

    Raises:
        ValueError: it is none of the values that :data:`VARIABLES` allows.
    """
    value = os.environ.get(name)
    if not value:
        return None
    allowed = VARIABLES[name]
    if allowed is not None and value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
    return value


def unknown() -> list[str]:
    """A sentence for each variable that looks like one of these and is none."""
    found = []
    for name in sorted(os.environ):
        if name in VARIABLES or not name.upper().startswith("KD"):
            continue
        near = difflib.get_close_matches(name.upper(), VARIABLES, n=1, cutoff=0.85)
        if near or name.upper().startswith("KDKERNELS_"):
            meant = f"; is {near[0]} meant?" if near else f"; there are {', '.join(VARIABLES)}"
            found.append(f"the environment variable {name} is none of kdkernels'{meant}")
    return found


def warn_of_unknown() -> None:
    """One warning for each of :func:`unknown`."""
    for sentence in unknown():
        warnings.warn(sentence, stacklevel=2)
