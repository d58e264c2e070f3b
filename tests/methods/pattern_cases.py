"""A model with groups along all kinds of dimensions, and what the tests of patterns share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration


class _Conv1D(nn.Module):
    """A linear layer with a weight ``[in, out]``, as Hugging Face's is."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


_Conv1D.__name__ = "Conv1D"


def mixed(seed: int = 0) -> Any:
    """Weights ``[2, 4, 2, 2]``, ``[8, 8]`` with inputs first, and ``[3, 8]``: 30 groups of 4."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        features = nn.Sequential(nn.Conv2d(4, 2, 2, bias=False), nn.Tanh(), nn.Flatten())
        return nn.Sequential(features, _Conv1D(8, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))


def places(model: Any) -> list[tuple[nn.Module, str]]:
    return [(model[0][0], "weight"), (model[1], "weight"), (model[3], "weight")]


def calibration_of(model: Any, **options: Any) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 4, 3, 3, generator=generator)
    y = torch.randint(3, (48,), generator=generator)
    data = list(zip(x.split(16), y.split(16), strict=True))
    return Calibration(
        model, data, cross_entropy, params=places(model), **{"num_samples": 32, **options}
    )


def groups_of(name: str, tensor: Tensor) -> Tensor:
    """``[groups, 4]`` inputs of one output, written out for each kind of layer."""
    found = []
    if name == "0.0.weight":
        for out in range(2):
            for row in range(2):
                found += [tensor[out, :, row, column] for column in range(2)]
    elif name == "1.weight":
        for out in range(8):
            found += [tensor[:4, out], tensor[4:, out]]
    else:
        for out in range(3):
            found += [tensor[out, :4], tensor[out, 4:]]
    return torch.stack(found)


def all_groups(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([groups_of(name, tensor) for name, tensor in tensors.items()])
