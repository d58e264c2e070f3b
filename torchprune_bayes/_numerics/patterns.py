"""Scores for pruning in patterns: ``N`` of every ``M`` entries are kept, or whole groups go.

Legend as in :mod:`~torchprune_bayes._numerics.fisher_blocks`, with ``H = F⁻¹``. Removing the set
``S`` and moving the others optimally raises the quadratic model by ``½ w_Sᵀ(H_SS)⁻¹w_S``. A group
is ``M`` consecutive entries of a block.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from torchprune_bayes._numerics.fisher_blocks import InverseFisher
from torchprune_bayes.errors import ArgumentError

_GROUPS = 64  # taken together


def group_inverses(inverse: InverseFisher, size: int) -> Tensor:
    """The blocks ``H_gg`` of all groups.

    Args:
        inverse: Inverse Fisher of the blocks.
        size: ``M``, entries of a group.

    Returns:
        Float64 ``[blocks, B/M, M, M]``.

    Raises:
        ArgumentError: If ``M`` does not divide the block size.

    Cost: ``B`` solves, for a few groups at a time.
    """
    blocks, entries = inverse.shape
    if entries % size:
        raise ArgumentError(f"Expected blocks of a multiple of {size} entries, got {entries}.")
    found = []
    for start in range(0, entries, _GROUPS * size):
        own = torch.arange(
            start, min(start + _GROUPS * size, entries), device=inverse.gradients.device
        )
        square = inverse.columns(own.expand(blocks, -1))[:, own]
        pairs = square.unflatten(2, (-1, size)).unflatten(1, (-1, size))
        found.append(pairs.diagonal(dim1=1, dim2=3).movedim(-1, 1))
    return torch.cat(found, dim=1)


def removal_costs(inverses: Tensor, weights: Tensor) -> Tensor:
    """``½ w_Sᵀ(H_SS)⁻¹w_S`` of sets of equal size, ``[...]`` for ``[..., k, k]``, ``[..., k]``."""
    solved = torch.linalg.solve(inverses, weights.unsqueeze(-1)).squeeze(-1)
    return 0.5 * (weights * solved).sum(-1)


def group_scores(inverse: InverseFisher, weights: Tensor, size: int) -> Tensor:
    """Scores for pruning whole groups: every entry has the cost of its group, ``[blocks, B]``.

    Args:
        inverse: Inverse Fisher of the blocks.
        weights: ``[blocks, B]``.
        size: ``M``.

    Example:
        >>> from torchprune_bayes._numerics.fisher_blocks import invert
        >>> none = invert(torch.zeros(1, 1, 4), damping=2.0)  # F = 2I
        >>> group_scores(none, torch.tensor([[1.0, 2.0, 3.0, 0.0]]), size=2)
        tensor([[5., 5., 9., 9.]], dtype=torch.float64)
    """
    inverses = group_inverses(inverse, size)
    costs = removal_costs(inverses, weights.double().unflatten(-1, (-1, size)))
    return costs.repeat_interleave(size, dim=-1)


def n_of_m_scores(inverse: InverseFisher, weights: Tensor, kept: int, size: int) -> Tensor:
    """Scores whose smallest ``(1 − N/M) B`` leave the ``N`` best of every ``M`` entries.

    Of all ways to remove ``M − N`` entries of a group the one of least cost is taken, each with the
    interactions within it.

    Args:
        inverse: Inverse Fisher of the blocks.
        weights: ``[blocks, B]``.
        kept: ``N``.
        size: ``M``; there are ``M!/(N!(M−N)!)`` ways.

    Returns:
        ``[blocks, B]`` in [0, 2): below 1 where an entry is to be pruned.

    Raises:
        ArgumentError: If ``N`` is not between 0 and ``M``, or ``M`` does not divide ``B``.

    Example:
        >>> from torchprune_bayes._numerics.fisher_blocks import invert
        >>> none = invert(torch.zeros(1, 1, 4), damping=1.0)
        >>> n_of_m_scores(none, torch.tensor([[1.0, 4.0, 3.0, 2.0]]), kept=2, size=4) >= 1
        tensor([[False,  True,  True, False]])
    """
    if not 0 < kept < size:
        raise ArgumentError(f"Expected N between 0 and M in N:M, got {kept}:{size}.")
    inverses = group_inverses(inverse, size)
    groups = weights.double().unflatten(-1, (-1, size))
    ways = torch.tensor(list(combinations(range(size), size - kept)), device=weights.device)
    costs = torch.stack(
        [removal_costs(inverses[..., way[:, None], way], groups[..., way]) for way in ways], dim=-1
    )
    pruned = ways[costs.argmin(-1)]
    keep = torch.ones_like(groups).scatter(-1, pruned, 0.0)
    rank = groups.abs() / groups.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    return (keep + 0.5 * rank).flatten(1)
