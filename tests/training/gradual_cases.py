"""A small training run that is pruned on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from torchprune_bayes import (
    Calibration,
)
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import linear
from torchprune_bayes.training import GradualPruner

MODES = ["zeros", "hooks"]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}
TWICE = linear(0.5, begin=2, end=4, every=2, initial=0.25)


class Network(nn.Module):
    """72 weights: 48 in ``first`` and 24 in ``last``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def weights(self) -> dict[str, Tensor]:
        """The weights in use, pruned by PyTorch or not."""
        return {name: value.detach() for name, value in ParameterSpace(self).values().items()}


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)


def calibration_for(model: nn.Module) -> Calibration:
    return Calibration(model, [batch(99, 48)], cross_entropy, num_samples=24, seed=5)


@dataclass
class Run:
    """A training that is the same whenever it starts from the same state."""

    model: Network
    optimizer: Optimizer
    pruner: GradualPruner

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            x, y = batch(step)
            self.optimizer.zero_grad()
            cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.pruner.step()


def run_of(
    method: Any = "magnitude",
    schedule: Any = TWICE,
    *,
    optimizer: str = "adamw",
    protect: bool = True,
    seed: int = 0,
    **options: Any,
) -> Run:
    torch.manual_seed(seed)
    model = Network()
    chosen = OPTIMIZERS[optimizer](model.parameters())
    if method not in ("magnitude", "layer-magnitude"):
        options["calibration"] = calibration_for(model)
    pruner = GradualPruner(
        model, method, schedule, optimizer=chosen if protect else None, **options
    )
    return Run(model, chosen, pruner)


def pruned(weights: dict[str, Tensor]) -> dict[str, int]:
    return {name: int((value == 0).sum()) for name, value in weights.items()}


def all_state(run: Run) -> list[Tensor]:
    moments = [
        value
        for entries in run.optimizer.state.values()
        for value in entries.values()
        if isinstance(value, Tensor)
    ]
    return [*run.model.state_dict().values(), *moments]
