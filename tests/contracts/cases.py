"""Small models, data and calls that the contract tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration, registered_methods
from torchprune_bayes.types import ParameterPairs

INPUTS, CLASSES, SAMPLES = 6, 3, 16


def mlp(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Two linear layers with 30 + 15 weights; the second has no bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)
    return nn.Sequential(*layers).to(dtype)


def pairs(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The weights of all linear and convolution layers."""
    layers = (nn.Linear, nn.Conv2d)
    return [(module, "weight") for module in model.modules() if isinstance(module, layers)]


def batches(*, dtype: torch.dtype = torch.float32, inputs: int = INPUTS) -> list[Any]:
    """Random inputs and labels, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, inputs, generator=generator).to(dtype)
    y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return list(zip(x.split(8), y.split(8), strict=True))


def calibration_of(model: nn.Module, params: ParameterPairs | None = None) -> Calibration:
    """A calibration on :func:`batches` in the dtype of the model."""
    params = pairs(model) if params is None else params
    first = next(model.parameters())
    data = batches(dtype=first.dtype)
    return Calibration(model, data, cross_entropy, params=params, num_samples=SAMPLES)


def options_of(name: str, model: nn.Module, params: ParameterPairs | None = None) -> dict[str, Any]:
    """The keyword arguments, but for ``amount``, with which a registered method runs."""
    if registered_methods()[name].needs_calibration:
        return {"calibration": calibration_of(model, params)}
    return {}


def masks_by_place(model: nn.Module) -> list[Tensor]:
    """PyTorch's masks of :func:`pairs`, as booleans; all ``True`` where there is none."""
    found = []
    for module, name in pairs(model):
        mask = getattr(module, f"{name}_mask", None)
        found.append(torch.ones_like(getattr(module, name)).bool() if mask is None else mask != 0)
    return found


def live_count(model: nn.Module) -> int:
    """Number of entries that are not pruned."""
    return sum(int(mask.sum()) for mask in masks_by_place(model))
