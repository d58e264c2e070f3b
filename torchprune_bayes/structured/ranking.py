"""Exact choice of units: the least important are removed until a sparsity is reached.

In plain words: all units are ranked together, the least important first, and the fewest from the
front are removed that make the model as small as requested. Units protected by a floor are not
ranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.unit_costs import Costs, Resource

Scope: TypeAlias = Literal["global", "layer"]


@dataclass(frozen=True)
class Ranking:
    """Blocks of units in the order in which they are removed.

    Attributes:
        groups: The groups.
        group: For each block, the index of its group.
        size: For each block, its number of units.
        score: For each block, the mean score of its units, or of the values given instead.
        order: For each group, its units in the order of removal.
    """

    groups: Sequence[UnitGroup]
    group: Tensor
    size: Tensor
    score: Tensor
    order: Mapping[str, Tensor]

    def left(self, blocks: int) -> dict[str, int]:
        """Return how many units each group has after so many blocks."""
        gone = torch.zeros(len(self.groups), dtype=torch.long)
        gone.index_add_(0, self.group[:blocks], self.size[:blocks])
        return {
            group.name: group.units - lost
            for group, lost in zip(self.groups, gone.tolist(), strict=True)
        }

    def kept(self, blocks: int) -> dict[str, Tensor]:
        """Return which units each group that loses some has after so many blocks, ascending."""
        return self.best(self.left(blocks))

    def best(self, left: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the units to keep of each group that loses some, given their numbers."""
        return {
            group.name: self.order[group.name][group.units - left[group.name] :].sort().values
            for group in self.groups
            if left[group.name] < group.units
        }


def rank_units(
    groups: Sequence[UnitGroup],
    scores: Mapping[str, Tensor],
    *,
    values: Mapping[str, Tensor] | None = None,
    scope: Scope = "global",
    min_keep: int = 1,
    round_to: int = 1,
) -> Ranking:
    """Rank the units of all groups together, the least important first.

    Ties go by the order of the groups, then by the index of the unit. A group is removed in blocks
    after which the number of its units is a multiple of ``round_to``; blocks are ranked by the mean
    of their scores.

    Args:
        groups: The groups.
        scores: One score for each unit, by the name of the group; a missing group stays whole.
        values: For each group, what its units are compared by with those of other groups, in the
            order in which they go, never falling; by default their scores.
        scope: ``"global"`` compares values between groups; ``"layer"`` compares ranks within their
            group instead, so that all groups lose the same fraction.
        min_keep: Units that every group keeps.
        round_to: Multiple for the units that are left in a group that loses some.

    Returns:
        The ranking.

    Raises:
        ArgumentError: If scores have another length, are no floating point numbers, or hold NaN.

    Cost: one sort of all units.

    Example:
        >>> groups = [UnitGroup("a", "hidden", 3, ()), UnitGroup("b", "hidden", 2, ())]
        >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([1.0, 9.0])}
        >>> ranking = rank_units(groups, scores)
        >>> ranking.score, ranking.kept(2)
        (tensor([1., 1., 2.], dtype=torch.float64), {'a': tensor([0, 2]), 'b': tensor([1])})
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    order: dict[str, Tensor] = {}
    for index, group in enumerate(groups):
        if group.name not in scores:
            continue
        ascending, order[group.name] = _checked(group, scores[group.name]).sort(stable=True)
        sizes = torch.tensor(_blocks(group.units, min_keep, round_to), dtype=torch.long)
        by_rank = sizes.cumsum(0).double() / group.units
        compared = ascending if values is None else values[group.name].cpu().double()
        keys = by_rank if scope == "layer" else _means(compared, sizes)
        parts.append((torch.full_like(sizes, index), sizes, keys))
    if not parts:
        empty = torch.zeros(0, dtype=torch.long)
        return Ranking(groups, empty, empty, empty.double(), order)
    group_of, size, score = (torch.cat(columns) for columns in zip(*parts, strict=True))
    score, places = score.sort(stable=True)
    return Ranking(groups, group_of[places], size[places], score, order)


def blocks_to_reach(
    ranking: Ranking,
    costs: Costs,
    resource: Resource,
    sparsity: float,
) -> int:
    """Return how many blocks of the ranking must go until a sparsity of the whole is reached.

    Args:
        ranking: The units, least important first.
        costs: Costs of the model at the start, to which the sparsity refers, counted or measured.
        resource: What is counted.
        sparsity: Fraction of the resource at the start that is to be gone.

    Returns:
        The smallest number with which it is.

    Raises:
        ArgumentError: If removing all that is ranked is not enough.

    Cost: a logarithmic number of evaluations of the cost.
    """

    def left_of(blocks: int) -> float:
        return costs.total(resource, ranking.left(blocks)) / costs.total(resource, {})

    budget = 1.0 - sparsity + 1e-12
    low, high = 0, len(ranking.group)
    if left_of(high) > budget:
        raise ArgumentError(_not_enough(left_of(high), resource, sparsity))
    while low < high:
        middle = (low + high) // 2
        if left_of(middle) > budget:
            low = middle + 1
        else:
            high = middle
    return low


def _not_enough(least: float, resource: Resource, sparsity: float) -> str:
    """What to do if a fraction of the resource is left when all that is ranked is gone."""
    if resource == "latency":
        return (
            f"Expected a sparsity of at most {max(1.0 - least, 0.0):.2g} in latency, got "
            f"{sparsity:g}: without all units that may go, a pass on these inputs still takes "
            f"{least:.0%} of the time; ask for less, or measure larger inputs on an idle machine."
        )
    return (
        f"Expected a sparsity of at most {1.0 - least:.6g} in {resource}, which ignored layers and "
        f"floors allow, got {sparsity:g}: ask for less, or lower `min_keep` or `round_to`."
    )


def left_to_reach(
    ranking: Ranking, costs: Costs, resource: Resource, sparsity: float
) -> dict[str, int]:
    """Return how many units each group has when a sparsity is reached and no block is wasted.

    The last block may be a large one, as a head, that removes more than it takes. Then the blocks
    before it are put back, those that went last first, as long as the sparsity is still reached.

    Args:
        ranking: The units, least important first.
        costs: Costs of the model at the start, to which the sparsity refers, counted or measured.
        resource: What is counted.
        sparsity: Fraction of the resource at the start that is to be gone.

    Raises:
        ArgumentError: If removing all that is ranked is not enough.

    Cost: that of :func:`blocks_to_reach`, and an evaluation of the cost for each group and for each
    block that is put back.
    """
    blocks = blocks_to_reach(ranking, costs, resource, sparsity)
    left, budget = ranking.left(blocks), (1.0 - sparsity + 1e-12) * costs.total(resource, {})
    closed: set[int] = set()
    removed = zip(ranking.group[:blocks].tolist(), ranking.size[:blocks].tolist(), strict=True)
    for index, size in reversed(list(removed)):
        name = ranking.groups[index].name
        more = {**left, name: left[name] + size}
        if index not in closed and costs.total(resource, more) <= budget:
            left = more
        else:  # the earlier blocks of a group come back after its later ones only
            closed.add(index)
        if len(closed) == len(ranking.groups):
            break
    return left


def blocks_below(ranking: Ranking, threshold: float) -> int:
    """Return how many blocks of the ranking score below a threshold."""
    return int((ranking.score < threshold).sum())


def _checked(group: UnitGroup, scores: Tensor) -> Tensor:
    if scores.shape != (group.units,) or not scores.is_floating_point():
        raise ArgumentError(
            f"Expected {group.units} floating point scores for `{group.name}`, got {scores.dtype} "
            f"of shape {tuple(scores.shape)}."
        )
    bad = int(scores.isnan().sum())
    if bad:
        raise ArgumentError(f"Expected scores without NaN for `{group.name}`, got {bad} of them.")
    return wide(scores.detach()).cpu()


def _means(ascending: Tensor, sizes: Tensor) -> Tensor:
    """Mean score of each block; rounding must not let a later block overtake an earlier one."""
    block = torch.arange(len(sizes)).repeat_interleave(sizes)
    sums = torch.zeros(len(sizes), dtype=ascending.dtype)
    means = sums.index_add_(0, block, ascending[: len(block)]) / sizes
    inf = float("inf")
    return means.nan_to_num(nan=inf, posinf=inf, neginf=-inf).cummax(0).values


def _blocks(units: int, min_keep: int, round_to: int) -> list[int]:
    """Sizes of the blocks in which a group can go, first one first."""
    floor = -(-max(min_keep, 1) // round_to) * round_to
    if units <= floor:
        return []
    rest = units % round_to
    return [rest] * bool(rest) + [round_to] * ((units - rest - floor) // round_to)
