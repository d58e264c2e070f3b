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


def alps(gram: Tensor, weights: Tensor, kept: int, penalty: float, steps: int) -> Tensor:
    """The mask of ALPS (algorithm 1), with every system solved anew and masks by sorting."""
    units = gram.diagonal().sqrt()
    normal, dense = gram / torch.outer(units, units), weights.double() * units

    def project(values: Tensor) -> Tensor:
        mask = torch.zeros(values.numel()).bool()
        mask[values.flatten().abs().argsort(descending=True)[:kept]] = True
        return values * mask.view_as(values)

    identity = torch.eye(len(gram)).double()
    sparse, pull = project(dense), torch.zeros_like(dense)
    before, moving = sparse != 0, False
    for step in range(steps):
        right = dense @ normal - pull + penalty * sparse
        fitted = torch.linalg.solve(normal + penalty * identity, right.mT).mT
        sparse = project(fitted + pull / penalty)
        pull = pull + penalty * (fitted - sparse)
        if step % 3 == 2:
            moved = int(((sparse != 0) != before).sum())
            if not moving and moved < 0.005 * kept:
                penalty /= 5
                sparse, pull = project(dense), torch.zeros_like(dense)
            elif moved == 0:
                break
            else:
                moving = True
                penalty *= 1.3 if moved >= 0.1 * kept else 1.2 if moved >= 0.005 * kept else 1.1
            before = sparse != 0
            if penalty < 1e-7:
                break
    largest = project(dense)
    errors = [float(torch.trace(c @ normal @ c.mT)) for c in (dense - sparse, dense - largest)]
    return (sparse if errors[0] <= errors[1] else largest) != 0
