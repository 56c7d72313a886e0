"""What importing the package costs: nothing of torch.compile's."""

from __future__ import annotations

import subprocess
import sys

from kdkernels import compiling

IMPORT = """
import sys, torch
before = set(sys.modules)
import kdkernels
print(*sorted({"torch._dynamo", "sympy", "triton"} & set(sys.modules) - before))
"""


def test_importing_the_package_does_not_import_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == ([], "")


def test_a_constant_result_is_what_torch_marks() -> None:
    import torch._dynamo

    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    compiling.constant_result(ours)
    torch._dynamo.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
