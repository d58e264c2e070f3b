"""Small models and data in float64 that the calibration's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration

Pair = tuple[Tensor, Tensor]
Sequential = Any  # nn.Sequential, of whose layers a type checker knows nothing
CLASSES = 3


def mlp() -> Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, CLASSES)
    ).double()


def conv_net() -> Sequential:
    """Convolutions, batch normalisation with statistics of its own, and dropout."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(6, CLASSES),
    ).double()
    model(torch.randn(16, 2, 6, 6, dtype=torch.float64))  # statistics that are not the defaults
    return model


def mlp_data(batches: tuple[int, ...] = (4, 3, 5)) -> list[Pair]:
    return _data(batches, (5,))


def conv_data(batches: tuple[int, ...] = (4, 3, 5)) -> list[Pair]:
    return _data(batches, (2, 6, 6))


CASES = [
    pytest.param(mlp, mlp_data, id="mlp"),
    pytest.param(conv_net, conv_data, id="conv"),
]
ModelFactory = Callable[[], Sequential]
DataFactory = Callable[[], list[Pair]]


def collected(calibration: Calibration, **options: Any) -> Tensor:
    """All rows of one pass, ``[num_gradients, D]``."""
    return torch.cat(list(calibration.gradients(**options)))


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of float64."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def mlp_calibration(model: nn.Module | None = None, **options: Any) -> Calibration:
    """A calibration of the small network; options replace or join the defaults."""
    defaults: dict[str, Any] = {"data": mlp_data(), "loss_fn": cross_entropy}
    return Calibration(mlp() if model is None else model, **(defaults | options))


def _data(batches: tuple[int, ...], shape: tuple[int, ...]) -> list[Pair]:
    source = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, *shape, generator=source, dtype=torch.float64),
            torch.randint(CLASSES, (size,), generator=source),
        )
        for size in batches
    ]
