"""What is kept in a folder, in a module that processes which are killed load quickly."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration
from torchprune_bayes.calibration import CheckpointedCalibration

ONE_AT_A_TIME = 1e-3  # MiB, less than two gradients take
GRADIENTS = 64


def data(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)


class Counted(nn.Sequential):
    samples = 0

    def forward(self, inputs: Tensor) -> Tensor:
        type(self).samples += len(inputs)
        return super().forward(inputs)


def arguments(**changed: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Counted(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    found = {"model": model, "data": [data(seed) for seed in range(8)], "loss_fn": cross_entropy}
    options = {"mini_batch": 2, "vectorize": False, "check_deterministic": False}
    return found | options | changed


def checkpointed(folder: Path, **changed: Any) -> CheckpointedCalibration:
    return CheckpointedCalibration(folder, **arguments(**changed))


def rows_of(calibration: Calibration, **options: Any) -> tuple[Tensor, int]:
    """All gradients, and how many samples went through the model for them."""
    Counted.samples = 0
    return torch.cat(list(calibration.gradients(**options))), Counted.samples


def collect(folder: Path, done: Any, path: Path) -> None:
    torch.set_num_threads(1)
    rows = []
    for part in checkpointed(folder, memory_mb=ONE_AT_A_TIME).gradients():
        rows.append(part)
        done.value += 1
        time.sleep(1e-3)  # as a large model would take
    save_file({"rows": torch.cat(rows)}, path)
