"""Greedy exact optimal brain surgeon: one weight at a time, always the cheapest.

Legend as in :mod:`~torchprune_bayes._numerics.fisher_blocks`, with ``H = F⁻¹``. Removing ``q``
costs ``w_q²/(2H_qq)`` and is followed by the exact update of the rest and by the removal of ``q``
from ``F``, a rank-one change of ``H``:

    w ← w − H_{:,q} w_q/H_qq,   H ← H − H_{:,q} H_{q,:}/H_qq.

The costs add up to the rise of the quadratic model for removing all of them with the joint update
(OBC, arXiv 2208.11580). One pass over a block records the order and the costs, from which every
sparsity follows, of one block or of many under one threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchprune_bayes._numerics.fisher_blocks import InverseFisher
from torchprune_bayes._numerics.patterns import removal_costs


class Removals(NamedTuple):
    """The record of one pass over a batch of blocks."""

    order: Tensor
    """Entries in the order of their removal, ``[blocks, B]``."""
    costs: Tensor
    """Rise of the quadratic model with each removal, float64 ``[blocks, B]``."""

    def scores(self) -> Tensor:
        """Scores whose smallest are always the first removals of each block, ``[blocks, B]``.

        A removal that is cheap only because of those before it takes over the largest cost among
        them. To prune the smallest scores of all blocks is then a global threshold on the costs.

        Example:
            >>> record = Removals(torch.tensor([[2, 0, 1]]), torch.tensor([[1.0, 4.0, 3.0]]))
            >>> record.scores().round()
            tensor([[4., 4., 1.]], dtype=torch.float64)
        """
        costs = self.costs.double()
        place = torch.arange(costs.shape[-1], device=costs.device, dtype=torch.float64)
        float64 = torch.finfo(torch.float64)
        # Equal scores would be pruned by index, so each is raised by a few units in the last place.
        ranked = costs.cummax(-1).values * (1.0 + 4.0 * float64.eps * place) + float64.tiny * place
        return torch.zeros_like(ranked).scatter(-1, self.order, ranked)


def greedy_removals(
    inverse: InverseFisher,
    weights: Tensor,
    *,
    kept: int = 0,
    size: int = 1,
    remaining: Tensor | None = None,
) -> Removals:
    """Remove the entries of each block one by one, always the one that costs the least.

    Args:
        inverse: Inverse Fisher of the blocks.
        weights: ``[blocks, B]``.
        kept: ``N`` of an N:M pattern: so many of every ``M`` consecutive entries are kept. They
            come last in the order, at infinite cost.
        size: ``M``, a divisor of ``B``.
        remaining: Boolean ``[blocks, B]``; entries pruned already are ``False`` and removed first.

    Cost: ``2B³`` multiplications and ``8B²`` bytes per block, in ``B`` steps over all blocks.

    Example:
        >>> from torchprune_bayes._numerics.fisher_blocks import invert
        >>> alike = invert(torch.tensor([[[1.0, 1.0, 0.0]]]), damping=1e-3)
        >>> greedy_removals(alike, torch.tensor([[2.0, 1.0, 9.0]])).order
        tensor([[1, 2, 0]])
    """
    blocks, entries = weights.shape
    every = torch.arange(entries, device=weights.device).expand(blocks, -1)
    matrix = inverse.columns(every)
    rest = weights.double().clone()
    remains = torch.ones_like(rest, dtype=torch.bool)
    order, costs = torch.zeros_like(every), torch.full_like(rest, torch.inf)
    pruned = torch.zeros_like(remains) if remaining is None else ~remaining
    removals = entries - entries // size * kept
    for step in range(removals):
        spare = remains.unflatten(-1, (-1, size)).sum(-1) > kept
        free = remains & spare.repeat_interleave(size, dim=-1)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        scores = (rest.square() / (2.0 * diagonal)).masked_fill(pruned, -1.0)
        cost, chosen = scores.masked_fill(~free, torch.inf).min(-1, keepdim=True)
        order[:, step], costs[:, step] = chosen[:, 0], cost[:, 0].clamp_min(0.0)
        column = matrix.gather(-1, chosen.unsqueeze(-2).expand(-1, entries, -1)).squeeze(-1)
        scaled = column / diagonal.gather(-1, chosen)
        rest -= scaled * rest.gather(-1, chosen)
        matrix.baddbmm_(column.unsqueeze(-1), scaled.unsqueeze(-2), alpha=-1.0)
        remains.scatter_(-1, chosen, False)
    order[:, removals:] = every[remains].unflatten(0, (blocks, -1))
    return Removals(order, costs)


def greedy_group_removals(inverse: InverseFisher, weights: Tensor, size: int) -> Removals:
    """Remove groups of ``M`` consecutive entries, always the one that costs the least.

    Removing a group ``g`` costs ``½ w_gᵀ(H_gg)⁻¹w_g``, with the interactions within it, and is
    followed by ``w ← w − H_{:,g}(H_gg)⁻¹w_g`` and ``H ← H − H_{:,g}(H_gg)⁻¹H_{g,:}``.

    Args:
        inverse: Inverse Fisher of the blocks.
        weights: ``[blocks, B]``.
        size: ``M``, a divisor of ``B``.

    Returns:
        Order and costs of the groups, ``[blocks, B/M]``.

    Cost: ``2B³ + B²M²`` multiplications and ``8B²`` bytes per block, in ``B/M`` steps.

    Example:
        >>> from torchprune_bayes._numerics.fisher_blocks import invert
        >>> none = invert(torch.zeros(1, 1, 4), damping=2.0)
        >>> greedy_group_removals(none, torch.tensor([[3.0, 0.0, 1.0, 2.0]]), size=2).order
        tensor([[1, 0]])
    """
    blocks, entries = weights.shape
    every = torch.arange(entries, device=weights.device)
    matrix = inverse.columns(every.expand(blocks, -1))
    rest = weights.double().clone()
    removed = torch.zeros(blocks, entries // size, dtype=torch.bool, device=weights.device)
    order, costs = torch.zeros_like(removed, dtype=torch.long), torch.zeros_like(rest[:, ::size])
    eye = torch.eye(size, dtype=torch.float64, device=weights.device)
    for step in range(entries // size):
        pairs = matrix.unflatten(2, (-1, size)).unflatten(1, (-1, size))
        own = pairs.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        own = torch.where(removed[..., None, None], eye, own)  # removed groups are zero in H
        scores = removal_costs(own, rest.unflatten(-1, (-1, size)))
        cost, chosen = scores.masked_fill(removed, torch.inf).min(-1)
        order[:, step], costs[:, step] = chosen, cost
        here = chosen.unsqueeze(-1) * size + every[:size]
        columns = matrix.gather(-1, here.unsqueeze(-2).expand(-1, entries, -1))
        block = columns.gather(-2, here.unsqueeze(-1).expand(-1, -1, size))
        scaled = torch.linalg.solve(block, columns, left=False)
        rest -= (scaled @ rest.gather(-1, here).unsqueeze(-1)).squeeze(-1)
        matrix.baddbmm_(scaled, columns.mT, alpha=-1.0)
        removed.scatter_(-1, chosen.unsqueeze(-1), True)
    return Removals(order, costs)
