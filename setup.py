"""Builds the native extension; all metadata is in pyproject.toml.

The extension is optional where no C++ compiler exists: the package then installs as pure Python and
one printed line says why. A compiler that is present and fails is an error of the build, never a
silent fallback.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Contraction is off because a*b - c*d must be exactly zero for equal operands (a student that
# equals its teacher); the kernels ask for a fused multiply-add where they want one.
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
COMMON_FLAGS += ["-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra", "-DNDEBUG"]

# One translation unit per instruction set, each with its own flags: whatever the unit defines must
# have internal linkage, or the linker could hand AVX-512 code to a machine without it.
UNIT_FLAGS = {
    "cpu/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "cpu/avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
UNIT_FLAGS["cpu/avx512.cpp"] += ["-mprefer-vector-width=512"]


@dataclass(frozen=True)
class Unit:
    """One source file, the ninja rule that compiles it, and the flags it needs besides."""

    source: Path
    rule: str
    flags: list[str]


def units() -> list[Unit]:
    """Every translation unit for this machine."""
    found = []
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("cpu/*.cpp")]):
        name = source.relative_to(SOURCES).as_posix()
        if name in UNIT_FLAGS and not IS_X86:
            continue
        found.append(Unit(source, "cxx", UNIT_FLAGS.get(name, [])))
    return found


def compiler() -> list[str]:
    """The C++ compiler as a command line: $CXX if it is set, else the first usual name on PATH."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    return next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), [])


def can_compile(command: list[str], source: str, *flags: str) -> bool:
    """Whether the compiler builds and links this program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        call = [*command, *flags, str(path), "-o", str(Path(folder, "probe"))]
        try:
            return subprocess.run(call, capture_output=True, timeout=120).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


def escape(path: Path | str) -> str:
    """A path as ninja spells it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it, because setuptools has no flags per source file."""

    def run(self) -> None:
        if self.why_not():
            print(
                f"kdkernels: installing without the native kernels: {self.why_not()}",
                file=sys.stderr,
            )
            self.extensions = []
        super().run()

    def why_not(self) -> str | None:
        """The reason why there is no compiler to use, or None."""
        command = compiler()
        if not command:
            return "no C++ compiler was found (set CXX to name one)"
        if not shutil.which(command[0]):
            return f"the C++ compiler {command[0]!r} (from CXX) does not exist"
        if not can_compile(command, "#include <vector>\nint main() {}\n", "-std=c++17"):
            return f"the C++ compiler {shlex.join(command)!r} cannot build a C++17 program"
        return None

    def get_outputs(self) -> list[str]:
        return super().get_outputs() if not self.why_not() else []

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(folder, target))

        import ninja

        jobs = os.environ.get("MAX_JOBS")
        call = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)]
        subprocess.check_call([*call, "-v"] + (["-j", jobs] if jobs else []))

    def ninja_file(self, folder: Path, target: Path) -> str:
        """The whole build as text: one rule per kind of source, one edge per unit, one link."""
        import pybind11

        command = compiler()
        openmp = can_compile(command, "#include <omp.h>\nint main() {}\n", "-fopenmp")
        if not openmp:
            print(
                "kdkernels: no OpenMP (-fopenmp fails): the native kernels run on one thread",
                file=sys.stderr,
            )
        headers = [SOURCES, pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = [
            *COMMON_FLAGS,
            *(f"-I{path}" for path in headers),
            *(["-fopenmp"] if openmp else ["-Wno-unknown-pragmas"]),
        ]
        flags += ["-DKDKERNELS_X86"] if IS_X86 else []
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        link = [
            "-shared",
            *(["-fopenmp"] if openmp else []),
            *shlex.split(os.environ.get("LDFLAGS", "")),
        ]
        link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-s"]

        lines = ["ninja_required_version = 1.5", f"cxx = {shlex.join(command)}", "rule cxx"]
        lines += [f"  command = $cxx -MMD -MF $out.d {shlex.join(flags)} $flags -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "rule link"]
        lines += [f"  command = $cxx $in {shlex.join(link)} -o $out"]
        objects = []
        for unit in units():
            objects.append(
                folder / (unit.source.relative_to(SOURCES).as_posix().replace("/", "_") + ".o")
            )
            lines += [f"build {escape(objects[-1])}: {unit.rule} {escape(unit.source)}"]
            lines += [f"  flags = {shlex.join(unit.flags)}"]
        lines += [f"build {escape(target)}: link {' '.join(map(escape, objects))}"]
        return "\n".join(lines) + "\n"


setup(ext_modules=[Extension("kdkernels._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
