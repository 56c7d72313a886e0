"""Builds the native extension; all metadata is in pyproject.toml.

The extension is optional where no C++ compiler exists: the package then installs as pure Python and
one printed line says why. A compiler that is present and fails is an error of the build, never a
silent fallback.

The CUDA kernels take minutes to compile. KDKERNELS_CUDA=auto (the default) compiles them where
there is nvcc and a GPU, for that GPU alone, and prints why it does not; 1 compiles them for every
architecture, or fails; 0 leaves them out. KDKERNELS_CUDA_ARCHS="80;90" chooses architectures.
KDKERNELS_CUDART=shared links the shared CUDA runtime and keeps only PTX: what the simulated tests
need (tests/simulate).
"""

import os
import platform
import re
import runpy
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

ENVIRONMENT = runpy.run_path(str(ROOT / "kdkernels" / "environment.py"))  # without torch

# Contraction is off because a*b - c*d must be exactly zero for equal operands (a student that
# equals its teacher); the kernels ask for a fused multiply-add where they want one.
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
COMMON_FLAGS += ["-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra", "-DNDEBUG"]

# One translation unit per instruction set, each with its own flags: whatever the unit defines must
# have internal linkage, or the linker could hand AVX-512 code to a machine without it.
UNIT_FLAGS = {
    # GCC orders instructions before it gives out registers: 5 to 10 % of the first sweep on Zen 3.
    "cpu/avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-fschedule-insns", "-fsched-pressure"],
    "cpu/avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
UNIT_FLAGS["cpu/avx512.cpp"] += ["-mprefer-vector-width=512"]


# sm_80 serves 86 and 89 too, and machine code for 100 serves 103.
DEFAULT_CUDA_ARCHS = ("80", "90", "100", "120")
# Contraction is off for the same reason as above.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
CUDA_FLAGS += ["-DNDEBUG", "-diag-suppress=177", "-Xfatbin=-compress-all"]


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
    if not why_no_cuda():
        found.extend(Unit(source, "cxx", []) for source in sorted(SOURCES.glob("cuda/*.cpp")))
        found.extend(Unit(source, "nvcc", []) for source in sorted(SOURCES.glob("cuda/*.cu")))
    return found


def setting(name: str) -> str | None:
    """An environment variable of the package; a bad value ends the build with its name."""
    try:
        value: str | None = ENVIRONMENT["setting"](name)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return value


def compiler() -> list[str]:
    """The C++ compiler as a command line: $CXX if it is set, else the first usual name on PATH."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    return next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), [])


def nvcc() -> str | None:
    """The CUDA compiler: $NVCC, the one of $CUDA_HOME, or the one on PATH."""
    if chosen := os.environ.get("NVCC"):
        return shutil.which(chosen)
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return shutil.which(str(Path(home, "bin", "nvcc")))
    return shutil.which("nvcc")


def cuda_homes(compiler_path: Path) -> list[Path]:
    """Where the toolkit may be: nvcc may be a script that calls the real one."""
    dry = subprocess.run(
        [str(compiler_path), "--dryrun", "-c", "-x", "cu", "/dev/null"],
        capture_output=True,
        text=True,
    ).stderr
    tops = [line.split("TOP=", 1)[1].strip() for line in dry.splitlines() if "TOP=" in line]
    return [Path(top).resolve() for top in tops] + [compiler_path.parent.parent]


def gpu_architectures() -> list[str]:
    """Those of DEFAULT_CUDA_ARCHS that serve this machine's GPUs."""
    try:
        call = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(call, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = set()
    for line in answer.split():
        major, _, minor = line.partition(".")
        if major.isdigit() and minor.isdigit():
            found |= {a for a in DEFAULT_CUDA_ARCHS if a[:-1] == major and a[-1] <= minor}
    return sorted(found, key=int)


def why_no_cuda() -> str | None:
    """The reason why this build leaves the CUDA kernels out, or None."""
    wish = setting("KDKERNELS_CUDA") or "auto"
    if wish == "0":
        return "KDKERNELS_CUDA=0"
    reason = None
    if sys.platform != "linux":
        reason = f"they are built on Linux only, not on {sys.platform}"
    elif not nvcc():
        reason = "nvcc was not found (set NVCC or CUDA_HOME)"
    if reason and wish == "1":
        raise SystemExit(f"KDKERNELS_CUDA=1, but {reason}")
    if not reason and wish == "auto" and not gpu_architectures():
        reason = (
            "there is no GPU that they support (KDKERNELS_CUDA=1 builds them anyway, in minutes)"
        )
    return reason


def cuda_architectures() -> list[str]:
    """From KDKERNELS_CUDA_ARCHS, this machine's GPUs, or all that this nvcc knows."""
    if chosen := setting("KDKERNELS_CUDA_ARCHS"):
        archs = [arch.strip() for arch in chosen.replace(",", ";").split(";")]
        if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
            raise SystemExit(f"KDKERNELS_CUDA_ARCHS={chosen!r} is no list like '80;90'")
        return archs
    wanted = DEFAULT_CUDA_ARCHS
    if setting("KDKERNELS_CUDA") in (None, "auto"):
        wanted = tuple(gpu_architectures())
    known = subprocess.run([str(nvcc()), "--list-gpu-code"], capture_output=True, text=True).stdout
    found = [arch for arch in wanted if f"sm_{arch}" in known.split()]
    if not found:
        raise SystemExit(f"{nvcc()} knows none of {wanted}; set KDKERNELS_CUDA_ARCHS")
    return found


def cuda_targets(shared_runtime: bool) -> list[str]:
    """nvcc's -gencode options: machine code for each architecture, PTX of the last beside it."""
    archs = cuda_architectures()
    if shared_runtime:
        return [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


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
        cuda_rule, cuda_link = self.cuda_rule()
        flags += ["-DKDKERNELS_CUDA"] if cuda_rule else []
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        link = [
            "-shared",
            *(["-fopenmp"] if openmp else []),
            *shlex.split(os.environ.get("LDFLAGS", "")),
        ]
        link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-s"]

        lines = ["ninja_required_version = 1.5", f"cxx = {shlex.join(command)}", "rule cxx"]
        lines += [f"  command = $cxx -MMD -MF $out.d {shlex.join(flags)} $flags -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", *cuda_rule, "rule link"]
        lines += [f"  command = $cxx $in {shlex.join([*link, *cuda_link])} -o $out"]
        objects = []
        for unit in units():
            objects.append(
                folder / (unit.source.relative_to(SOURCES).as_posix().replace("/", "_") + ".o")
            )
            lines += [f"build {escape(objects[-1])}: {unit.rule} {escape(unit.source)}"]
            lines += [f"  flags = {shlex.join(unit.flags)}"]
        lines += [f"build {escape(target)}: link {' '.join(map(escape, objects))}"]
        return "\n".join(lines) + "\n"

    def cuda_rule(self) -> tuple[list[str], list[str]]:
        """The ninja rule that compiles CUDA sources, and what the link needs; empty: no CUDA."""
        if reason := why_no_cuda():
            print(f"kdkernels: building without the CUDA kernels: {reason}", file=sys.stderr)
            return [], []
        shared = setting("KDKERNELS_CUDART") == "shared"
        archs = ", ".join(("compute_" if shared else "sm_") + arch for arch in cuda_architectures())
        flags = [*CUDA_FLAGS, *cuda_targets(shared), f'-DKDKERNELS_CUDA_ARCHS="{archs}"']
        compiler_path = Path(str(nvcc())).resolve()
        library = next(
            (
                home / lib
                for home in cuda_homes(compiler_path)
                for lib in ("lib64", "lib")
                if (home / lib / "libcudart_static.a").exists()
            ),
            compiler_path.parent.parent / "lib64",
        )
        link = [f"-L{library}"]
        link += ["-lcudart"] if shared else ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        lines = [f"nvcc = {shlex.quote(str(nvcc()))}", "rule nvcc"]
        lines += [f"  command = $nvcc -MMD -MF $out.d {shlex.join(flags)} $flags -c $in -o $out"]
        return [*lines, "  depfile = $out.d", "  deps = gcc"], link


for sentence in ENVIRONMENT["unknown"]():
    print(f"kdkernels: {sentence}", file=sys.stderr)
setup(ext_modules=[Extension("kdkernels._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
