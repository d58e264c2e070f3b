"""What it costs to remove many weights at once when the others make up for it.

Legend: ``G`` gradients ``[N, B]``, ``λ`` damping, ``F = λI + GᵀG/N`` the Fisher block, ``P`` the
entries of one unit, ``w`` weights ``[B]``, ``S = GGᵀ + NλI``.

The least rise of ``½ δᵀFδ`` with ``δ_P = −w_P`` is ``½ w_Pᵀ((F⁻¹)_PP)⁻¹w_P``, the joint form of the
optimal brain surgeon (WoodFisher, arXiv 2004.14340, appendix). By the Woodbury identity this is

    λ/2 · w_Pᵀ(I − G_PᵀS⁻¹G_P)⁻¹w_P = λ/2 · (|w_P|² + s_Pᵀ(S − G_PG_Pᵀ)⁻¹s_P),   s_P = G_Pw_P,

with one matrix of size ``|P|``, or one of size ``N``, for each unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import safe_cholesky
from torchprune_bayes._numerics.fisher_blocks import gram


def joint_costs(
    gradients: Tensor,
    damping: float,
    weights: Tensor,
    indices: Tensor,
    valid: Tensor,
    memory_bytes: float = 2.0**28,
) -> Tensor:
    """Cost of removing each unit alone, with the exact answer of all other entries of the block.

    Args:
        gradients: ``[N, B]``.
        damping: ``λ > 0``.
        weights: ``[B]``.
        indices: ``[units, m]``, the entries of each unit, each entry once, padded at will.
        valid: Boolean ``[units, m]``, ``False`` for padding.
        memory_bytes: Room for the matrices of the units that are dealt with at one time.

    Returns:
        ``[units]`` float64.

    Cost: ``N²B`` once, ``N²m + n³/3`` for each unit with ``n = min(N, m)``.

    Example:
        >>> g, w = torch.tensor([[1.0, 0.0]]), torch.tensor([2.0, 3.0])
        >>> both = torch.tensor([[0], [1]])
        >>> joint_costs(g, 1.0, w, both, torch.ones_like(both, dtype=torch.bool))
        tensor([4.0000, 4.5000], dtype=torch.float64)
    """
    rows, damped = _root(gradients), len(gradients) * damping
    inner = gram(rows)
    inner.diagonal().add_(damped)
    longest, smaller = indices.shape[1], min(indices.shape[1], len(rows))
    by_entries = longest <= len(rows)
    factor = safe_cholesky(inner) if by_entries else inner
    per_unit = 8 * (3 * len(rows) * longest + 3 * smaller**2)
    chunk = max(int(memory_bytes / per_unit), 1)
    costs = []
    for index, real in zip(indices.split(chunk), valid.split(chunk), strict=True):
        own = weights[index].double() * real  # [units, m]
        columns = rows[:, index].transpose(0, 1).double() * real.unsqueeze(1)  # [units, N, m]
        form = _by_entries if by_entries else _by_samples
        costs.append(0.5 * damping * form(columns, own, factor))
    return torch.cat(costs) if costs else weights.new_zeros(0, dtype=torch.float64)


def own_costs(
    gradients: Tensor, weights: Tensor, entries: Tensor, units: Tensor, count: int
) -> Tensor:
    """``½ Σ_n (g_nP · w_P)²``, what removing each unit costs if nothing else moves.

    Without damping and not divided by the number of gradients, so that parts of them add up.

    Args:
        gradients: ``[N, B]``.
        weights: ``[B]``.
        entries: ``[pairs]``, positions in the block.
        units: ``[pairs]``, the unit that owns each of them.
        count: Number of units.

    Returns:
        ``[count]`` float64.
    """
    changes = gradients.new_zeros(len(gradients), count, dtype=torch.float64)
    changes.index_add_(1, units, (gradients[:, entries] * weights[entries]).double())
    return 0.5 * changes.square().sum(0)


def _root(gradients: Tensor) -> Tensor:
    # Any matrix with the same GᵀG will do, and the triangular factor has no more rows than columns.
    count, size = gradients.shape
    return torch.linalg.qr(gradients.double(), mode="r").R if count > size else gradients


def _by_entries(columns: Tensor, own: Tensor, factor: Tensor) -> Tensor:
    whitened = torch.linalg.solve_triangular(
        factor.expand(len(columns), -1, -1), columns, upper=False
    )
    rest = -(whitened.mT @ whitened)
    rest.diagonal(dim1=-2, dim2=-1).add_(1.0)
    solved = torch.cholesky_solve(own.unsqueeze(-1), safe_cholesky(rest))
    return (own.unsqueeze(-1) * solved).sum((1, 2))


def _by_samples(columns: Tensor, own: Tensor, inner: Tensor) -> Tensor:
    change = columns @ own.unsqueeze(-1)  # s_P, [units, N, 1]
    solved = torch.cholesky_solve(change, safe_cholesky(inner - columns @ columns.mT))
    return own.square().sum(1) + (change * solved).sum((1, 2))
