"""``kdkernels sweep``: trials, the best settings, the files, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_line
import pytest
import tiny_models
import yaml
from command_line import options, refused

from kdkernels.commands import main as cli
from kdkernels.commands import sweep
from kdkernels.commands.sweep import SweepArguments

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread
llama_assets = command_line.llama_assets


def command(assets: Path, output: Path, *lists: str, **changes: Any) -> list[str]:
    return ["sweep", *options(assets, output, **changes)[1:], *lists]


def test_a_grid_and_the_run_that_its_best_settings_give(
    llama_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    lists = ["--sweep_temperatures", "1", "4", "--sweep_alphas", "0.3", "1"]
    lists += ["--sweep_divergences", "forward_kl", "jsd", "--sweep_steps", "2"]
    assert cli.main(command(llama_assets, output, *lists)) == 0
    outcome = json.loads((output / "sweep.json").read_text())
    trials = outcome["trials"]
    assert len(trials) == 8 and {trial["steps"] for trial in trials} == {2}
    assert len({trial["loss"] for trial in trials}) == 8
    best = min(trials, key=lambda trial: trial["loss"])
    assert outcome["best"] == {
        "temperature": best["temperature"],
        "alpha": best["alpha"],
        "divergence": best["divergence_name"],
    }
    assert sorted(p.name for p in output.iterdir()) == sorted(sweep.RESULT_FILES)
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sweep.table(outcome) in (output / "sweep.md").read_text()
    assert sweep.table(outcome) in capsys.readouterr().out

    settings = yaml.safe_load((output / "best.yaml").read_text())
    assert settings["max_steps"] == 4 and not [name for name in settings if "sweep" in name]
    again = ["distill", str(output / "best.yaml"), f"--output_dir={tmp_path / 'run'}"]
    assert cli.main([*again, "--max_steps=2", "--baseline=false"]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert rows[-1]["loss"] == pytest.approx(best["loss"], rel=1e-6)  # the trial, repeated


def test_a_search_is_seeded_and_within_its_ranges(llama_assets: Path, tmp_path: Path) -> None:
    arguments = SweepArguments(sweep_trials=40, sweep_divergences=["jsd", "forward_kl"])
    drawn = arguments.settings(0)
    assert drawn == arguments.settings(0) != arguments.settings(1)
    assert all(1 <= s["temperature"] <= 8 and 0.5 <= s["alpha"] <= 0.9 for s in drawn)
    assert {s["divergence"] for s in drawn} == {"jsd", "forward_kl"}
    changes = {"sweep_trials": 2, "sweep_steps": 1, "sweep_metric": "agreement"}
    assert cli.main(command(llama_assets, tmp_path / "out", **changes)) == 0
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["trials"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep_temperatures": 0}, "sweep_temperatures: 0.0 is not a number from"),
        ({"sweep_temperatures": "nan"}, "sweep_temperatures: nan is not a number from"),
        ({"sweep_alphas": 0}, "sweep_alphas: 0.0 is not in (0, 1]"),
        ({"sweep_divergences": "kl"}, "sweep_divergences: 'kl' is not one of forward_kl"),
        ({"sweep_trials": 0}, "sweep_trials: 0 is not at least 1"),
        ({"sweep_steps": 0}, "sweep_steps: 0 is not at least 1"),
        ({"sweep_metric": "kd"}, "sweep_metric: 'kd' is not one of loss, agreement, accuracy"),
        ({"alpha_schedule": "linear:1:0"}, "alpha_schedule: cannot be given together with a sweep"),
        ({"divergence": "jsd", "beta": 0.1}, "sweep_divergences: 'forward_kl': "),
        ({"sweep_temps": 1}, "unknown option '--sweep_temps=1'"),
    ],
)
def test_bad_input_is_one_line(
    changes: dict[str, Any],
    message: str,
    llama_assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    refused(command(llama_assets, tmp_path / "out", **changes), message, capfd)
    assert not (tmp_path / "out").exists()
