"""Scores for pruning in patterns: ``N`` of every ``M`` entries are kept, or whole groups go.

Legend as in :mod:`~torchprune_bayes._numerics.fisher_blocks`, with ``H = F⁻¹``. Removing the set
``S`` and moving the others optimally raises the quadratic model by ``½ w_Sᵀ(H_SS)⁻¹w_S``. A group
is ``M`` consecutive entries of a block.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from torchprune_bayes._numerics.fisher_blocks import InverseFisher, WoodburyInverse
from torchprune_bayes._numerics.gradient_tiles import read
from torchprune_bayes._numerics.precision import float64_device, wide
from torchprune_bayes.errors import ArgumentError

_GROUPS = 64  # processed at a time


def group_inverses(inverse: InverseFisher, size: int) -> Tensor:
    """The blocks ``H_gg`` of all groups.

    Args:
        inverse: Inverse Fisher of the blocks.
        size: ``M``, entries of a group.

    Returns:
        Float64 ``[blocks, B/M, M, M]``.

    Raises:
        ArgumentError: If ``M`` does not divide the block size.

    Cost: ``N²B + NMB`` in the sample space, else ``B`` solves; for a few groups at a time.
    """
    entries = inverse.shape[-1]
    if entries % size:
        raise ArgumentError(f"Expected blocks of a multiple of {size} entries, got {entries}.")
    part_of = _in_sample_space if isinstance(inverse, WoodburyInverse) else _by_columns
    starts = range(0, entries, _GROUPS * size)
    return torch.cat(
        [part_of(inverse, start, min(start + _GROUPS * size, entries), size) for start in starts],
        dim=1,
    )


def _in_sample_space(inverse: InverseFisher, start: int, stop: int, size: int) -> Tensor:
    # H = (I − XᵀX)/λ, so a group needs its own columns of X alone.
    assert isinstance(inverse, WoodburyInverse)
    columns = wide(read(inverse.gradients, start, stop))
    whitened = inverse.whitened(columns)
    groups = whitened.unflatten(-1, (-1, size)).movedim(-3, -2)  # [blocks, groups, N, M]
    eye = torch.eye(size, dtype=torch.float64, device=columns.device)
    return (eye - groups.mT @ groups) / inverse.damping


def _by_columns(inverse: InverseFisher, start: int, stop: int, size: int) -> Tensor:
    own = torch.arange(start, stop, device=float64_device(inverse.gradients.device))
    square = inverse.columns(own.expand(inverse.shape[0], -1))[:, own]
    pairs = square.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return pairs.diagonal(dim1=1, dim2=3).movedim(-1, 1)


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


def n_of_m_scores(
    inverse: InverseFisher, weights: Tensor, kept: int, size: int, remaining: Tensor | None = None
) -> Tensor:
    """Scores whose smallest leave the ``N`` best remaining entries of every ``M``.

    Of all ways to remove ``M − N`` entries of a group the one of least cost is chosen, each with
    the interactions within it. Entries that are pruned already are removed first.

    Args:
        inverse: Inverse Fisher of the blocks.
        weights: ``[blocks, B]``.
        kept: ``N``.
        size: ``M``; there are ``M!/(N!(M−N)!)`` ways.
        remaining: Boolean ``[blocks, B]``, ``False`` where an entry is pruned already.

    Returns:
        ``[blocks, B]`` in [0, 2): below 1 where an entry is to be pruned, in the order of
        ``w²/(2H_ii)``.

    Raises:
        ArgumentError: If ``N`` is not between 0 and ``M``, or ``M`` does not divide ``B``.

    Example:
        >>> from torchprune_bayes._numerics.fisher_blocks import invert
        >>> none = invert(torch.zeros(1, 1, 4), damping=1.0)
        >>> n_of_m_scores(none, torch.tensor([[1.0, 4.0, 3.0, 2.0]]), kept=2, size=4) >= 1
        tensor([[False,  True,  True, False]])
    """
    _check_n_of_m(kept, size)
    inverses = group_inverses(inverse, size)
    groups = weights.double().unflatten(-1, (-1, size))
    ways = torch.tensor(list(combinations(range(size), size - kept)), device=weights.device)
    costs = torch.stack(
        [removal_costs(inverses[..., way[:, None], way], groups[..., way]) for way in ways], dim=-1
    )
    if remaining is not None:
        pruned = (~remaining).unflatten(-1, (-1, size))[..., ways].sum(-1)
        costs = costs.masked_fill(pruned < pruned.amax(-1, keepdim=True), torch.inf)
    keep = torch.ones_like(groups).scatter(-1, ways[costs.argmin(-1)], 0.0)
    alone = groups.square() / (2.0 * inverses.diagonal(dim1=-2, dim2=-1))
    return _in_two_halves(keep, alone).flatten(-2)


def n_of_m_ranks(scores: Tensor, kept: int, size: int, remaining: Tensor) -> Tensor:
    """As :func:`n_of_m_scores`, for entries whose scores do not interact.

    Args:
        scores: Not negative, ``[..., B]``.
        kept: ``N``.
        size: ``M``.
        remaining: Boolean, like ``scores``.

    Example:
        >>> n_of_m_ranks(torch.tensor([1.0, 4.0, 3.0, 2.0]), 2, 4, torch.ones(4).bool()) >= 1
        tensor([False,  True,  True, False])
    """
    _check_n_of_m(kept, size)
    groups = scores.double().unflatten(-1, (-1, size))
    best = groups.masked_fill(~remaining.unflatten(-1, (-1, size)), -1.0).argsort(
        dim=-1, stable=True
    )
    keep = torch.zeros_like(groups).scatter(-1, best[..., -kept:], 1.0)
    return _in_two_halves(keep, groups).flatten(-2)


def _in_two_halves(keep: Tensor, scores: Tensor) -> Tensor:
    # Scores of [0, ∞) go to [0, ½) where an entry is pruned, to [1, 1½) where it is kept.
    return keep + 0.5 * scores / (1.0 + scores)


def _check_n_of_m(kept: int, size: int) -> None:
    if not 0 < kept < size:
        raise ArgumentError(f"Expected N between 0 and M in N:M, got {kept}:{size}.")


def merged(gradients: Tensor, weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """One entry for each group, such that to prune it is to prune the group.

    With ``a_g = Σ_{k∈g} w_k g_k`` a group has the weight ``‖w_g‖`` and the gradients ``a_g/‖w_g‖``,
    so that ``‖Σ a‖²/N + λ‖w_P‖²`` is the same for groups as for their entries.

    Args:
        gradients: ``[blocks, N, B]``.
        weights: ``[blocks, B]``.
        size: ``M``.

    Returns:
        Gradients ``[blocks, N, B/M]`` and weights ``[blocks, B/M]``.

    Example:
        >>> merged(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[3.0, 4.0]]), size=2)
        (tensor([[[2.2000]]]), tensor([[5.]]))
    """
    groups = weights.unflatten(-1, (-1, size))
    norms = torch.linalg.vector_norm(groups, dim=-1)
    shares = groups / norms.clamp_min(torch.finfo(norms.dtype).tiny).unsqueeze(-1)
    # A product for each group, without a weighted copy of the gradients.
    columns = gradients.unflatten(-1, (-1, size)).movedim(-3, -2)
    return (columns @ shares.to(gradients).unsqueeze(-1)).squeeze(-1).mT, norms
