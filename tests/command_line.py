"""What tests of commands share: a small valid command line, its models, and how one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from kdkernels.commands import main as cli


def options(assets: Path, output: Path, **changes: Any) -> list[str]:
    """A small valid command line; None removes an option."""
    chosen: dict[str, Any] = {
        "teacher": assets / "teacher",
        "student_layers": "0,3",
        "train_text": assets / "text.txt",
        "sequence_length": 16,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "output_dir": output,
    } | changes
    return ["distill", *(f"--{k}={v}" for k, v in chosen.items() if v is not None)]


def refused(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The command ends with code 2 and one line that contains ``message``."""
    capfd.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capfd.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err, captured.err
    assert captured.err.startswith("kdkernels") and message in captured.err


@pytest.fixture(scope="module")
def llama_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save_model(folder / "teacher", layers=4, seed=2)
    tiny_models.save_model(folder / "other", layers=4, seed=3)
    words = torch.randint(len(tiny_models.WORDS), (600,)).tolist()
    (folder / "text.txt").write_text(" ".join(tiny_models.WORDS[i] for i in words))
    return folder
