from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integrations.processes import (
    PROCESSES,
    forget_accelerator,
    in_two_processes,
    load_all,
    save_from,
)
from tests.integrations.scripts import recipe

QUICK = ["--cpu", "--epochs", "1", "--calibration-samples", "24", "--batch-size", "64"]


def _run(folder: Path) -> None:
    import torch.distributed as dist

    with recipe("accelerate", "prune_digits") as module:
        found = module.main([*QUICK, "--method", "diagonal-fisher", "--output", str(folder)])
    assert dist.get_world_size() == PROCESSES
    save_from(dist.get_rank(), found, folder.with_suffix(".found"))


def test_the_recipe_runs_in_two_processes(tmp_path: Path) -> None:
    in_two_processes(_run, tmp_path / "out")
    first, second = load_all(tmp_path / "out.found")
    assert first == second
    weights = load_file(tmp_path / "out" / "model.safetensors")
    pruned = [value for value in weights.values() if value.ndim > 1]
    zeros = sum(int((value == 0).sum()) for value in pruned)
    assert zeros / sum(value.numel() for value in pruned) == pytest.approx(first["sparsity"])


def test_the_recipe_runs_alone(tmp_path: Path) -> None:
    forget_accelerator()  # of tests before this one
    with recipe("accelerate", "prune_digits") as module:
        found = module.main(
            [*QUICK, "--accumulate", "2", "--mixed-precision", "bf16", "--output", str(tmp_path)]
        )
    assert found["sparsity"] == pytest.approx(0.9, abs=1e-3)
