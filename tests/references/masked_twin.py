"""The dense model with units zeroed, entry by entry, as the lists of the groups say."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torchprune_bayes.structured.groups import UnitGroup


def masked_twin(
    model: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]
) -> nn.Module:
    """A deep copy of ``model`` in which every entry of every unit that is not kept is zero."""
    twin = copy.deepcopy(model)
    tensors = {
        **dict(twin.named_parameters(remove_duplicate=False)),
        **dict(twin.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for group in groups:
            stays = kept[group.name].tolist() if group.name in kept else range(group.units)
            for unit in set(range(group.units)) - set(stays):
                for piece in group.slices:
                    for position in piece.positions[unit].tolist():
                        tensors[piece.name].select(piece.dim, position).zero_()
    return twin


def random_kept(
    groups: Sequence[UnitGroup], fraction: float = 0.5, seed: int = 0
) -> dict[str, Tensor]:
    """For each group a random choice of units, at least one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.units, generator=generator)[
            : max(1, round(fraction * group.units))
        ]
        for group in groups
    }
