"""Pruned linear layers by the letter: least squares row by row, the surgeon column by column."""

from __future__ import annotations

import torch
from torch import Tensor


def solved_rows(gram: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """``argmin (w − ŵ)ᵀ G (w − ŵ)`` on each row's mask, by the normal equations of that row."""
    found = torch.zeros_like(weights, dtype=torch.float64)
    for row, (weight, mask) in enumerate(zip(weights.double(), keep, strict=True)):
        if mask.any():
            right = (gram @ weight)[mask]
            found[row, mask] = torch.linalg.solve(gram[mask][:, mask], right)
    return found


def swept(gram: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """The optimal brain surgeon on one column after the other, with those before it fixed.

    The inverse of the Hessian of the columns that are still free is made anew for every column
    (SparseGPT, equation 3), and so needs no Cholesky factor.
    """
    found = weights.double().clone()
    columns = len(gram)
    for j in range(columns):
        inverse = torch.linalg.inv(gram[j:, j:])
        error = torch.where(keep[:, j], 0.0, found[:, j]) / inverse[0, 0]
        found[:, j:] -= torch.outer(error, inverse[0])
        found[:, j] *= keep[:, j]
    return found


def sparse_gpt(gram: Tensor, weights: Tensor, sparsity: float, block: int) -> Tensor:
    """SparseGPT's mask, chosen block by block by ``w²/(G⁻¹)_jj`` of the free columns."""
    found = weights.double().clone()
    keep = torch.ones_like(found).bool()
    for start in range(0, len(gram), block):
        stop = min(start + block, len(gram))
        costs = torch.stack(
            [
                found[:, j].square() / torch.linalg.inv(gram[j:, j:])[0, 0]
                for j in range(start, stop)
            ],
            1,
        )
        lowest = costs.flatten().argsort()[: round(sparsity * costs.numel())]
        part = torch.ones(costs.numel()).bool()
        part[lowest] = False
        keep[:, start:stop] = part.view_as(costs)
        for j in range(start, stop):
            inverse = torch.linalg.inv(gram[j:, j:])
            error = torch.where(keep[:, j], 0.0, found[:, j]) / inverse[0, 0]
            found[:, j:] -= torch.outer(error, inverse[0])
            found[:, j] *= keep[:, j]
    return found * keep
