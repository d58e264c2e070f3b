"""Models and data that the tests of sensitivity methods share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration

Data = tuple[Tensor, Tensor]


def chain(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLUs in between, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def conv_net(seed: int = 0) -> nn.Sequential:
    """Convolutions with stride and groups, a batch norm in use, and a linear layer, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(4)
        norm.running_mean = torch.randn(4)
        norm.running_var = 0.5 + torch.rand(4)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            norm,
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, groups=2, bias=False),
            nn.Flatten(),
            nn.Linear(6, 3),
        ).double()


def data_for(*shape: int, classes: int, seed: int = 1) -> Data:
    """Random inputs ``[samples, ...]`` and labels, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (shape[0],), generator=generator)


def calibration_on(model: nn.Module, data: Data, **options: int) -> Calibration:
    """A calibration on all of the data, in two batches of different sizes."""
    x, y = data
    cut = len(y) // 3
    batches = [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    return Calibration(model, batches, cross_entropy, **options)  # type: ignore[arg-type]
