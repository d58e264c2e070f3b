"""A small network, its data as one process and as two see them, and quick options of methods."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes import registered_methods

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """102 weights, always the same ones."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(count: int, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, 6, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def taken_in_turns(data: list[Batch]) -> list[Batch]:
    """What one process sees as the union: in each round all there is of the first, then ..."""
    return [pair for share in (data[0::2], data[1::2]) for pair in share]


METHODS = [name for name, entry in registered_methods().items() if entry.needs_calibration]
OPTIONS: dict[str, dict[str, Any]] = {
    # A few candidates are enough to see that all of them are judged on the samples of all.
    "cbs": {"perturbations": 2, "max_iterations": 2, "damping": 1e-3},
    "cbs-post-update": {"perturbations": 2, "max_iterations": 2, "damping": 1e-3},
    "force": {"steps": 2},
    "iterative-snip": {"steps": 2},
    "synflow": {"steps": 2},
    "woodtaylor": {"damping": 1e-3},
}


def options_of(method: str) -> dict[str, Any]:
    """Fast ones, without labels drawn at random, which depend on how samples come in batches."""
    known = inspect.signature(registered_methods()[method].method).parameters
    return OPTIONS.get(method, {}) | ({"kind": "ggn"} if "kind" in known else {})
