"""Environment variables: honoured, or named in a refusal or a warning. Each in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels import environment
from kdkernels.backends import BACKENDS, native

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(native.MODULE is None, reason="the native module was not built")

CALL = """
import torch, kdkernels
z = torch.randn({rows}, 1000, requires_grad=True)
for attempt in range(2):
    try:
        kdkernels.fused_kd_loss(z, torch.randn({rows}, 1000)).backward()
        print("done")
    except ValueError as error:
        print(error)
"""


def run_python(code: str, rows: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code.replace("{rows}", str(rows))],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


@needs_native
@pytest.mark.parametrize("value", ("sse9", "AVX2", " avx2", "avx2 ", "yes", "avx1024"))
def test_an_instruction_set_that_there_is_not_is_named(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDKERNELS_CPU_ISA", value)
    with pytest.raises(ValueError, match=f"KDKERNELS_CPU_ISA='{value}'.*baseline"):
        native.MODULE.cpu_isa()


@needs_native
@pytest.mark.parametrize("value", ("sse9", " avx2"))
def test_an_instruction_set_that_cannot_run_is_no_reason_for_another_backend(value: str) -> None:
    done = run_python(CALL, KDKERNELS_CPU_ISA=value)
    assert done.stdout.count(f"KDKERNELS_CPU_ISA='{value}'") == 2, done.stdout + done.stderr
    assert "baseline" in done.stdout and "done" not in done.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "kdkernels", "info"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "KDKERNELS_CPU_ISA": value},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert shown.returncode == 0 and f"KDKERNELS_CPU_ISA='{value}'" in shown.stdout


@needs_native
def test_an_instruction_set_is_the_one_that_the_variable_names_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for isa in [*native.MODULE.cpu_isas(), *reversed(native.MODULE.cpu_isas())]:
        monkeypatch.setenv("KDKERNELS_CPU_ISA", isa)
        assert native.MODULE.cpu_isa() == isa
    monkeypatch.setenv("KDKERNELS_CPU_ISA", "")
    assert native.MODULE.cpu_isa() == native.MODULE.cpu_isas()[-1]


@pytest.mark.parametrize("value", ("yes", "false", "off", "no", "2", " 0"))
def test_a_switch_is_0_or_1(value: str) -> None:
    done = run_python(CALL, rows=600, KDKERNELS_KEEP_GRADIENT_MEMORY=value)
    assert f"KDKERNELS_KEEP_GRADIENT_MEMORY: {value!r} is not one of 0, 1" in done.stdout


@pytest.mark.parametrize("value", ("", "0", "1"))
def test_a_switch_that_is_one(value: str) -> None:
    done = run_python(CALL, rows=600, KDKERNELS_KEEP_GRADIENT_MEMORY=value)
    assert done.stdout == "done\ndone\n", done.stderr


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("KDKERNELS_CPU_IAS", "KDKERNELS_CPU_ISA"),
        ("kdkernels_cpu_isa", "KDKERNELS_CPU_ISA"),
        ("KDKERNEL_CPU_ISA", "KDKERNELS_CPU_ISA"),
        ("KD_KERNELS_CACHE", "KDKERNELS_CACHE"),
        ("KDKERNELS_CUDA_ARCH", "KDKERNELS_CUDA_ARCHS"),
        ("KDKERNELS_KEEP_GRADIENT", "KDKERNELS_KEEP_GRADIENT_MEMORY"),
        ("KDKERNELS_THREADS", "KDKERNELS_CACHE"),  # nothing near: all of them are listed
    ],
)
def test_a_misspelt_variable_is_named(
    wrong: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(wrong, "1")
    with pytest.warns(UserWarning, match=rf"{wrong} is none of .*{meant}"):
        environment.warn_of_unknown()


def test_what_belongs_to_others_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KDEHOME", "KDE_FULL_SESSION", "KD_TREE", "KERNELS", *environment.VARIABLES):
        monkeypatch.setenv(name, "1")
    assert environment.unknown() == []


def test_the_import_warns_once() -> None:
    done = run_python("import kdkernels, kdkernels.training", KDKERNELS_CPU_IAS="avx2")
    assert done.stderr.count("is KDKERNELS_CPU_ISA meant?") == 1, done.stderr


def test_every_variable_that_is_read_is_known() -> None:
    """In Python through `setting`, in C++ by getenv."""
    sources = [*ROOT.glob("kdkernels/**/*.py"), *ROOT.glob("csrc/**/*.c*"), ROOT / "setup.py"]
    for path in sources:
        text = path.read_text()
        assert 'environ.get("KDKERNELS' not in text, path
        for part in text.split('getenv("KDKERNELS')[1:] + text.split('setting("KDKERNELS')[1:]:
            assert "KDKERNELS" + part.partition('"')[0] in environment.VARIABLES, path


@pytest.mark.parametrize("content", (None, "{", "[]"))
def test_measured_launches_that_cannot_be_read_are_named(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdkernels.backends.triton import policy

    file = tmp_path / "tune.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("KDKERNELS_TUNE", str(file))
    policy.all_tuned.cache_clear()
    try:
        with pytest.warns(UserWarning, match="tune.json are not used"):
            assert policy.all_tuned() == {}
        file.write_text(json.dumps({"key": {}}))
        policy.all_tuned.cache_clear()
        assert policy.all_tuned() == {"key": {}}
    finally:
        policy.all_tuned.cache_clear()


def test_interpreting_is_asked_for_before_the_kernels_are_imported() -> None:
    if "triton" not in BACKENDS or os.environ.get("TRITON_INTERPRET"):
        pytest.skip("TRITON_INTERPRET is set")
    pytest.importorskip("triton")
    code = """
import os, kdkernels
kdkernels.available_backends()
os.environ["TRITON_INTERPRET"] = "1"
print(kdkernels.available_backends()["triton"])
"""
    done = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert "set after the kernels had been imported" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KDKERNELS_CUDA", "yes"),
        ("KDKERNELS_CUDA", "true"),
        ("KDKERNELS_CUDART", "Shared"),
        ("KDKERNELS_CUDA_ARCHS", "sm_90"),
        ("KDKERNELS_CUDA_ARCHS", "9.0"),
    ],
)
def test_a_build_names_what_it_cannot_do(name: str, value: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    code = f"""
import importlib.util, setuptools
setuptools.setup = lambda **_: None
spec = importlib.util.spec_from_file_location("setup", {str(ROOT / "setup.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.nvcc = lambda: "nvcc"
module.why_no_cuda(), module.cuda_architectures(), module.setting("KDKERNELS_CUDART")
"""
    done = run_python(code, **({"KDKERNELS_CUDA": "1"} | {name: value}))
    assert done.returncode == 1 and f"{name}" in done.stderr and value in done.stderr
    assert "Traceback" not in done.stderr
