"""The recipes as a user starts them, by ``accelerate launch``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.scripts import RECIPES

# It starts the processes it is asked for only where it believes in several GPUs; the recipes find
# that there are none and talk through gloo.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
LAUNCH += ["--multi_gpu", "--num_processes", "2"]


def launch(script: str, *arguments: str) -> str:
    """Run a recipe to its end; returns what it printed."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found = subprocess.run(
        [*LAUNCH, str(RECIPES / script), *arguments],
        env=os.environ | hidden,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_trainer_recipe_runs_in_two_processes(tmp_path: Path) -> None:
    quick = ["--max-steps", "4", "--max-samples", "24", "--batch-size", "6", "--layers", "1"]
    quick += ["--width", "24", "--calibration-samples", "8", "--prune-steps", "2"]
    quick += ["--method", "diagonal-fisher", "--output", str(tmp_path)]
    launch("hf/prune_text_classifier.py", *quick)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["processes"] == 2
    metrics = written["metrics"]
    assert metrics["eval_sparsity"] == pytest.approx(0.8, abs=2e-3)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"], rel=1e-4)


def test_the_recipe_with_a_loop_runs_in_two_processes(tmp_path: Path) -> None:
    quick = ["--cpu", "--epochs", "1", "--calibration-samples", "24", "--batch-size", "64"]
    quick += ["--method", "diagonal-fisher", "--output", str(tmp_path)]
    printed = launch("accelerate/prune_digits.py", *quick)
    assert printed.count("2 processes, sparsity 0.9000") == 1  # by the first one alone
