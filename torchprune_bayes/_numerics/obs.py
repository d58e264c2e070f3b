"""Optimal brain surgeon updates: what the kept weights do when others are set to zero.

Legend as in :mod:`~torchprune_bayes._numerics.fisher_blocks`; ``ḡ = Gᵀ1/N`` is the mean gradient
and ``η`` how much of the first-order term is taken. The joint update solves

    min_δ  η ḡᵀδ + ½ δᵀFδ   subject to   δ_P = −w_P

and is linear in ``η``, so it is returned as two directions. With ``R = [G_P w_P, −1]`` it has three
equal forms: least squares over the kept weights, ``δ_K = F_KK⁻¹ G_KᵀR/N``; the same in the space of
the samples, ``δ_K = G_Kᵀ(NλI + G_K G_Kᵀ)⁻¹R``; and the dual over the pruned weights, which is the
update of CBS (arXiv 2203.04466). Each factorises one matrix, of size ``|K|``, ``N`` or ``|P|``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import safe_cholesky
from torchprune_bayes._numerics.fisher_blocks import InverseFisher, gram, invert, times


class Directions(NamedTuple):
    """An update ``δ = compensation + η · newton``, each float64 ``[blocks, B]``."""

    compensation: Tensor
    """``−w`` on ``P``; what the kept weights do about it on ``K``."""
    newton: Tensor
    """The step down the gradient that the kept weights take for ``η = 1``; zero on ``P``."""


def single_directions(inverse: InverseFisher, weights: Tensor, keep: Tensor) -> Directions:
    """Sum of the updates for pruning each weight alone (WoodFisher, arXiv 2004.14340).

    ``δ = −F⁻¹(1_P ⊙ (w − ηu) ⊘ diag F⁻¹) − ηu`` with ``u = F⁻¹ḡ``: one Jacobi sweep towards the
    joint update.

    Args:
        inverse: Inverse Fisher of the blocks.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, ``False`` for ``P``.
    """
    mean = inverse.gradients.double().mean(-2)
    descent = inverse.solve(mean)
    pair = torch.stack([weights.double(), -descent], dim=-1)
    rest = torch.where(keep, 0.0, 1.0 / inverse.inverse_diagonal()).unsqueeze(-1) * pair
    solved = -inverse.solve(rest)
    return _on_support(solved[..., 0], solved[..., 1] - descent, weights, keep)


def joint_directions(
    gradients: Tensor, damping: float, weights: Tensor, keep: Tensor, inner: Tensor | None = None
) -> Directions:
    """Exact joint update in the cheapest of its three equal forms.

    Args:
        gradients: ``[blocks, N, B]``.
        damping: ``λ > 0``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, ``False`` for ``P``.
        inner: ``GGᵀ`` in float64, if it is known.

    Cost per block: ``N²m + m³/3`` with ``m = min(N, |K|)``, or ``N²B + |P|³/3`` for the dual.
    """
    kept = int(keep.sum(-1).max())
    if gradients.shape[-2] <= kept:
        return joint_directions_in_sample_space(gradients, damping, weights, keep, inner)
    if int((~keep).sum(-1).max()) < kept // 4:  # the dual also inverts the whole block
        return joint_directions_in_dual(gradients, damping, weights, keep)
    return joint_directions_in_primal(gradients, damping, weights, keep)


def whole_gram_helps(gradients: Tensor, keep: Tensor) -> bool:
    """Whether the joint update is cheaper with ``GGᵀ`` at hand: ``G_PG_Pᵀ`` is then taken off."""
    return gradients.shape[-2] <= int(keep.sum(-1).max()) and 2 * int(keep.sum()) > keep.numel()


def joint_directions_in_sample_space(
    gradients: Tensor, damping: float, weights: Tensor, keep: Tensor, inner: Tensor | None = None
) -> Directions:
    """``δ_K = G_Kᵀ(NλI + G_K G_Kᵀ)⁻¹R``: ridge regression with one unknown per sample."""
    right = _right_hand_side(gradients, weights, keep)
    kept, indices = _compact(gradients, keep)
    if inner is None or not whole_gram_helps(gradients, keep):
        damped = gram(kept)
    else:  # GGᵀ = G_K G_Kᵀ + G_P G_Pᵀ, and P is the smaller part
        damped = inner - gram(_compact(gradients, ~keep)[0])
    damped.diagonal(dim1=-2, dim2=-1).add_(gradients.shape[-2] * damping)
    dual = torch.cholesky_solve(right, safe_cholesky(damped))
    return _from_kept(times(kept.mT, dual), indices, weights, keep)


def joint_directions_in_primal(
    gradients: Tensor, damping: float, weights: Tensor, keep: Tensor
) -> Directions:
    """``δ_K = (λI + G_KᵀG_K/N)⁻¹G_KᵀR/N``: least squares over the kept weights."""
    right = _right_hand_side(gradients, weights, keep)
    kept, indices = _compact(gradients, keep)
    count = gradients.shape[-2]
    fisher = gram(kept.mT) / count
    fisher.diagonal(dim1=-2, dim2=-1).add_(damping)
    solved = torch.cholesky_solve(times(kept.mT, right) / count, safe_cholesky(fisher))
    return _from_kept(solved, indices, weights, keep)


def joint_directions_in_dual(
    gradients: Tensor, damping: float, weights: Tensor, keep: Tensor
) -> Directions:
    """``δ = −F⁻¹_{:,P}(F⁻¹_PP)⁻¹(w_P − ηu_P) − ηu`` with the unconstrained step ``u = F⁻¹ḡ``."""
    inverse = invert(gradients, damping)
    descent = inverse.solve(gradients.double().mean(-2))
    pair = torch.stack([weights.double(), -descent], dim=-1)
    indices, valid = _positions(~keep)
    columns = inverse.columns(indices) * valid.unsqueeze(1)
    block = columns.gather(1, indices.unsqueeze(-1).expand(-1, -1, indices.shape[-1]))
    block = block * valid.unsqueeze(-1)
    block.diagonal(dim1=-2, dim2=-1).add_((~valid).double())  # padding solves to zero
    right = pair.gather(1, indices.unsqueeze(-1).expand(-1, -1, 2)) * valid.unsqueeze(-1)
    solved = -columns @ torch.cholesky_solve(right, safe_cholesky(block))
    return _on_support(solved[..., 0], solved[..., 1] - descent, weights, keep)


def _right_hand_side(gradients: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    removed = torch.where(keep, 0.0, weights.double()).unsqueeze(-1)
    residual = times(gradients, removed)
    return torch.cat([residual, -torch.ones_like(residual)], dim=-1)  # [blocks, N, 2]


def _positions(chosen: Tensor) -> tuple[Tensor, Tensor]:
    # Indices of the chosen entries of each block, padded to the longest; `valid` marks the real.
    longest = int(chosen.sum(-1).max())
    order = torch.argsort((~chosen).to(torch.uint8), dim=-1, stable=True)[..., :longest]
    return order, chosen.gather(-1, order)


def _compact(gradients: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    # Columns of the kept entries only; padding columns are zero and drop out of every product.
    indices, valid = _positions(keep)
    columns = gradients.gather(-1, indices.unsqueeze(1).expand(-1, gradients.shape[-2], -1))
    return columns.mul_(valid.unsqueeze(1)), indices


def _from_kept(kept: Tensor, indices: Tensor, weights: Tensor, keep: Tensor) -> Directions:
    spread = kept.new_zeros((*weights.shape, 2))
    spread.scatter_(1, indices.unsqueeze(-1).expand(-1, -1, 2), kept)
    return _on_support(spread[..., 0], spread[..., 1], weights, keep)


def _on_support(compensation: Tensor, newton: Tensor, weights: Tensor, keep: Tensor) -> Directions:
    return Directions(
        torch.where(keep, compensation, -weights.double()), torch.where(keep, newton, 0.0)
    )
