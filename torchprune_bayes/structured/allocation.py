"""How many units each group loses: the comparison of units of different groups.

In plain words: scores say in which order the units of one group are removed. An allocation gives
each place in that order a number that is comparable between groups; the units with the smallest
numbers are removed first, whatever their group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.measured_costs import MeasuredCosts
from torchprune_bayes.structured.unit_costs import Costs, Resource

Allocation: TypeAlias = Literal["measured", "global", "layer", "isomorphic"]

ALLOCATIONS = ("measured", "global", "layer", "isomorphic")


def unit_prices(costs: Costs, groups: Sequence[UnitGroup], resource: Resource) -> dict[str, float]:
    """Return the cost of one unit of each group in a resource, with all others unchanged.

    Args:
        costs: Costs of the model at the start, counted or measured.
        groups: The groups as they are now.
        resource: The resource.

    Example:
        >>> from torchprune_bayes.structured import UnitCosts, find_groups
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups = find_groups(model, torch.zeros(1, 4))
        >>> unit_prices(UnitCosts.measure(model, groups), groups, "params")
        {'0': 7.0}
    """
    left = {group.name: group.units for group in groups}
    if isinstance(costs, MeasuredCosts):
        return costs.prices(left)
    whole = costs.total(resource, left)
    return {
        name: float(whole - costs.total(resource, {**left, name: units - 1}))
        for name, units in left.items()
    }


def per_price(values: Mapping[str, Tensor], prices: Mapping[str, float]) -> dict[str, Tensor]:
    """Divide values by what a unit costs; units without cost are never removed."""
    return {
        name: wide(value) / prices[name]
        if prices[name] > 0.0
        else torch.full_like(wide(value), torch.inf)
        for name, value in values.items()
    }


def isomorphic_ranks(
    model: nn.Module, groups: Sequence[UnitGroup], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return, for each unit, its rank among the units of all groups with the same wiring.

    `Isomorphic Pruning (Fang et al., 2024) <https://arxiv.org/abs/2407.04616>`_: scores are
    compared within a class of groups with the same layers in the same places, and every class loses
    the same fraction.

    Args:
        model: The model.
        groups: Its groups.
        scores: Scores by the name of the group.

    Returns:
        Ranks in (0, 1], in the order of the units.
    """
    classes: dict[tuple[object, ...], list[str]] = {}
    for group in groups:
        if group.name in scores:
            classes.setdefault(_wiring(model, group), []).append(group.name)
    ranks: dict[str, Tensor] = {}
    for names in classes.values():
        sizes = [len(scores[name]) for name in names]
        pooled = torch.cat([scores[name].cpu().double() for name in names])
        rank = torch.empty(len(pooled), dtype=torch.float64)
        rank[pooled.argsort(stable=True)] = torch.arange(1.0, len(pooled) + 1).double()
        ranks.update(zip(names, (rank / len(pooled)).split(sizes), strict=True))
    return ranks


def _wiring(model: nn.Module, group: UnitGroup) -> tuple[object, ...]:
    """Structure of a group without its sizes: layers, tensors and dimensions, sorted."""
    pieces = []
    for piece in group.slices:
        path, _, local = piece.name.rpartition(".")
        module = model.get_submodule(path)
        kernel = getattr(module, "kernel_size", None)
        pieces.append((piece.role, type(module).__name__, local, piece.dim, str(kernel)))
    return (group.kind, *sorted(pieces))
