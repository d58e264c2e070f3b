"""Filters by the size of their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
from torchprune_bayes.structured.importance import UnitImportance
from torchprune_bayes.structured.importances._calibrated import pieces_of, sums_along


class L1FilterImportance(UnitImportance):
    """Mean absolute weight of the filters, rows or projections that make a unit.

    `Pruning Filters for Efficient ConvNets (Li et al., 2017) <https://arxiv.org/abs/1608.08710>`_
    removes the filters with the smallest sum of absolute weights in each layer, which is
    ``shrink(..., allocation="layer")``. Divided by their number, the order within a layer is the
    same, and layers of different size can be compared. Biases do not count.

    Cost: elementwise.

    Example:
        >>> from torchprune_bayes.structured.groups import UnitSlice
        >>> layer = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, -3.0], [0.5, 0.5]]))
        >>> rows = UnitSlice("weight", 0, torch.arange(2)[:, None], "producer")
        >>> L1FilterImportance().score(UnitGroup("", "hidden", 2, (rows,)), layer)
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Score a group; ``None`` if no matrix or kernel makes its units.

        Args:
            group: The group.
            model: The model that its names refer to.
        """
        tensors = [(piece, model.get_parameter(piece.name)) for piece in _made_by(group, model)]
        if not tensors:
            return None
        sums = torch.stack([sums_along(tensor.detach().abs(), piece) for piece, tensor in tensors])
        entries = sum(
            piece.positions.shape[1] * tensor.numel() // tensor.shape[piece.dim]
            for piece, tensor in tensors
        )
        return sums.sum(0) / entries


def _made_by(group: UnitGroup, model: nn.Module) -> list[UnitSlice]:
    return [p for p in pieces_of(group, "producer") if model.get_parameter(p.name).dim() > 1]
