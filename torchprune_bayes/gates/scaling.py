"""Scaling the weights that produce or read units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.precision import float64_device, wide
from torchprune_bayes.gates.site import weight_dim
from torchprune_bayes.layer_kinds import Side
from torchprune_bayes.params import leaf


@torch.no_grad()
def scale_units(module: nn.Module, side: Side, scale: Tensor) -> None:
    """Multiply the rows (``"out"``, bias included) or columns (``"in"``) of a layer in place.

    Args:
        module: Layer or batch norm, pruned by PyTorch's masks or not.
        side: Which entries the units are.
        scale: ``[entries]``.
    """
    weight, bias = leaf(module, "weight"), leaf(module, "bias")
    assert weight is not None
    sizes = [1] * weight.ndim
    sizes[0 if weight.ndim == 1 else weight_dim(module, side)] = -1
    scale = wide(scale.to(float64_device(weight.device)))
    weight.copy_(wide(weight) * scale.view(sizes))
    if side == "out" and bias is not None:
        bias.copy_(wide(bias) * scale)


def unit_norms(module: nn.Module, side: Side, repeat: int) -> Tensor:
    """Euclidean norm of the weights that produce or read each unit, float64 ``[units]``."""
    weight = leaf(module, "weight")
    assert weight is not None
    dim = 0 if weight.ndim == 1 else weight_dim(module, side)
    rows = wide(weight.detach()).movedim(dim, 0).reshape(weight.shape[dim] // repeat, -1)
    return rows.norm(dim=1)
