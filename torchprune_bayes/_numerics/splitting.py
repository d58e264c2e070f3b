"""The best mask of a linear layer by operator splitting, with the penalty of ALPS.

Legend: ``W [rows, n]`` weights, ``G [n, n]`` the damped second moment of the inputs. Without units:
``w_j √G_jj`` in place of ``w_j``, and ``G_ij / √(G_ii G_jj)`` in place of ``G_ij``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchprune_bayes._numerics.precision import wide

Projection = Callable[[Tensor], Tensor]
"""``project(values) -> keep``: the entries that stay, those of the largest squares."""

_EVERY = 3  # steps between two looks at the mask
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the mask that moved, factor of ρ
_SMALLER, _SMALLEST = 5.0, 1e-6


def splitting_mask(
    gram: Tensor, weights: Tensor, project: Projection, *, penalty: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Find a mask and weights on it that change the outputs little, by ADMM.

    `ALPS (Meng et al., 2024) <https://arxiv.org/abs/2406.07831>`_, algorithm 1: one copy ``B`` of
    the weights fits the outputs, another one ``D`` is sparse, and ``V`` pulls them together:
    ``B = (WG − V + ρD)(G + ρ)⁻¹``, ``D`` is what is kept of ``B + V/ρ``, and ``V += ρ(B − D)``.
    Every three steps ``ρ`` grows, the faster the more of the mask has moved; the end is where it
    moves no more. Where it does not move to begin with, ``ρ`` is too large to leave the mask of the
    largest weights, and is divided by five. The problem is not convex, and the end may be worse
    than the start: then the mask of the largest weights is returned, with these as they were.

    Args:
        gram: ``G``, float64 ``[n, n]``, positive definite.
        weights: ``W``, ``[rows, n]``.
        project: Chooses what is kept.
        penalty: ``ρ`` to begin with.
        steps: Steps at most.

    Returns:
        The mask, and ``D`` in the units of ``W``, in the dtype that was computed in: float32, or
        float64 where the weights are.

    Cost: ``10 n³`` for the eigenvalues, then ``rows n²`` a step and ``n³`` every three.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> largest = lambda values: values.abs() == values.abs().amax(1, keepdim=True)
        >>> splitting_mask(gram, torch.tensor([[2.0, 1.0]]), largest, penalty=0.1, steps=30)[0]
        tensor([[ True, False]])
    """
    dtype = torch.promote_types(weights.dtype, torch.float32)
    units = wide(gram).diagonal().sqrt()
    values, vectors = torch.linalg.eigh(wide(gram) / torch.outer(units, units))
    values = values.clamp_min(torch.finfo(values.dtype).eps)
    scale = units.to(dtype)
    dense = weights.to(dtype) * scale
    wanted = dense @ ((vectors * values) @ vectors.mT).to(dtype)
    keep = first = project(dense)
    sparse, pull = dense * keep, torch.zeros_like(dense)
    inverse = _inverse(values, vectors, penalty, dtype)
    seen, moving = keep, False
    for step in range(1, steps + 1):
        fitted = (wanted - pull + penalty * sparse) @ inverse
        target = fitted + pull / penalty
        keep = project(target)
        sparse = target * keep
        pull = pull + penalty * (fitted - sparse)
        if step % _EVERY:
            continue
        moved = int((keep != seen).sum())
        share = moved / max(int(keep.sum()), 1)
        if not moving and share < _GROWTH[1][0]:
            if penalty < _SMALLEST:
                break
            penalty /= _SMALLER
            keep = first
            sparse, pull = dense * keep, torch.zeros_like(dense)
        elif moved:
            moving = True
            penalty *= next(factor for least, factor in _GROWTH if share >= least)
        else:
            break
        seen, inverse = keep, _inverse(values, vectors, penalty, dtype)
    if _error(dense - sparse, values, vectors) > _error(dense * ~first, values, vectors):
        keep, sparse = first, dense * first
    return keep, sparse / scale


def _error(change: Tensor, values: Tensor, vectors: Tensor) -> float:
    """``tr(C G Cᵀ)``, what a change ``C`` of the weights does to the outputs."""
    return float(((wide(change) @ vectors).square() * values).sum())


def _inverse(values: Tensor, vectors: Tensor, penalty: float, dtype: torch.dtype) -> Tensor:
    """``(G + ρ)⁻¹``."""
    return ((vectors / (values + penalty)) @ vectors.mT).to(dtype)
