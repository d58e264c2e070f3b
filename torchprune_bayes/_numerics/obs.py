"""Optimal brain surgeon updates: what the kept weights do when others are set to zero.

Legend as in :mod:`~torchprune_bayes._numerics.fisher_blocks`; ``ḡ = Gᵀ1/N`` is the mean gradient
and ``η`` the weight of the first-order term. The joint update solves

    min_δ  η ḡᵀδ + ½ δᵀFδ   subject to   δ_P = −w_P

and is linear in ``η``, so it is returned as two directions. With ``R = [G_P w_P, −1]`` it has two
equal forms that are used: least squares over the kept weights, ``δ_K = F_KK⁻¹ G_KᵀR/N``, and the
same in the space of the samples, ``δ_K = G_Kᵀ(NλI + G_K G_Kᵀ)⁻¹R``. (The dual over the pruned
weights, as CBS, arXiv 2203.04466, writes it, is a third.) Each factorises one matrix, of size
``|K|`` or ``N``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import damped_factor, damped_factor_inverse
from torchprune_bayes._numerics.fisher_blocks import InverseFisher, bounded_shares
from torchprune_bayes._numerics.gradient_tiles import (
    Gradients,
    chosen_columns,
    damped_gram,
    gram,
    mean,
    times_vector,
    transposed_times,
    whitened_squares,
)
from torchprune_bayes._numerics.precision import in_dtype, wide


class Directions(NamedTuple):
    """An update ``δ = compensation + η · newton``, each ``[blocks, B]``.

    In float64, or in float32 where :func:`~torchprune_bayes._numerics.gradient_tiles.damped_gram`
    finds that enough.
    """

    compensation: Tensor
    """``−w`` on ``P``; what the kept weights do about it on ``K``."""
    newton: Tensor
    """The step down the gradient that the kept weights take for ``η = 1``; zero on ``P``."""
    diagonal: Tensor | None = None
    """Diagonal of ``F_KK⁻¹`` on ``K`` if it was asked for; without meaning on ``P``."""


def single_directions(inverse: InverseFisher, weights: Tensor, keep: Tensor) -> Directions:
    """Sum of the updates for pruning each weight alone (WoodFisher, arXiv 2004.14340).

    ``δ = −F⁻¹(1_P ⊙ (w − ηu) ⊘ diag F⁻¹) − ηu`` with ``u = F⁻¹ḡ``: one Jacobi sweep towards the
    joint update.

    Args:
        inverse: Inverse Fisher of the blocks.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, ``False`` for ``P``.
    """
    descent = inverse.solve(mean(inverse.gradients))
    pair = torch.stack([wide(weights), -descent], dim=-1)
    kept = keep.to(pair.device)
    rest = torch.where(kept, 0.0, 1.0 / inverse.inverse_diagonal()).unsqueeze(-1) * pair
    solved = -inverse.solve(rest)
    solved[..., 1] -= descent
    return _on_support(solved, weights, keep)


def joint_directions(
    gradients: Gradients,
    damping: float,
    weights: Tensor,
    keep: Tensor,
    *,
    kept: int | None = None,
    inner: Tensor | None = None,
    change: Tensor | None = None,
    descent: bool = True,
    diagonal: bool = False,
) -> Directions:
    """Exact joint update in the cheaper of its two forms.

    Args:
        gradients: ``[blocks, N, B]``.
        damping: ``λ > 0``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, ``False`` for ``P``.
        kept: Most entries that a block keeps, if already known; reading it from the device takes
            time.
        inner: ``G_K G_Kᵀ``, if already computed.
        change: ``Gw``, ``[blocks, N]``, if already computed; taken in its dtype alone.
        descent: Whether to compute the first-order part; otherwise it is zero.
        diagonal: Whether to compute that of ``F_KK⁻¹`` from the same factor; for small blocks in
            memory.

    Cost per block: ``N²m + m³/3`` with ``m = min(N, |K|)``; for the diagonal ``m³/3`` more, and
    ``N²B/2`` where ``|K| > N``.
    """
    kept = int(keep.sum(-1).max()) if kept is None else kept
    if kept <= gradients.shape[-2]:
        return joint_directions_from_kept(
            gradients,
            damping,
            weights,
            keep,
            kept,
            change=change,
            descent=descent,
            diagonal=diagonal,
        )
    return joint_directions_in_sample_space(
        gradients, damping, weights, keep, inner, descent=descent, diagonal=diagonal
    )


def kept_inner(
    gradients: Gradients, keep: Tensor, kept: int, inner: Tensor | None = None
) -> Tensor:
    """``G_K G_Kᵀ``, float64 ``[blocks, N, N]``.

    Args:
        gradients: ``[blocks, N, B]``.
        keep: Boolean ``[blocks, B]``.
        kept: Most entries that a block keeps.
        inner: ``GGᵀ`` of all entries; with it, a single block costs only the smaller part.
    """
    if inner is None or len(keep) > 1 or 2 * kept <= keep.numel():
        return gram(gradients, keep)
    return inner - gram(gradients, ~keep)


def removed_change(
    gradients: Gradients, weights: Tensor, keep: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``G_P w_P``: what the pruned weights did to every sample, ``[blocks, N]``."""
    return times_vector(gradients, torch.where(keep, 0.0, weights), dtype)


def joint_directions_in_sample_space(
    gradients: Gradients,
    damping: float,
    weights: Tensor,
    keep: Tensor,
    inner: Tensor | None = None,
    *,
    descent: bool = True,
    diagonal: bool = False,
) -> Directions:
    """``δ_K = G_Kᵀ(NλI + G_K G_Kᵀ)⁻¹R``: ridge regression with one unknown per sample.

    Args:
        gradients: ``[blocks, N, B]``.
        damping: ``λ > 0``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, ``False`` for ``P``.
        inner: ``G_K G_Kᵀ``, if already computed.
        descent: Whether to compute the first-order part.
        diagonal: Whether to compute that of ``F_KK⁻¹``; for small blocks in memory.
    """
    ridge = gradients.shape[-2] * damping
    inner = damped_gram(gradients, ridge, keep) if inner is None else inner
    change = removed_change(gradients, weights, keep, inner.dtype)
    right = _right_hand_side(change, descent)
    if not diagonal or not isinstance(gradients, Tensor):
        dual = torch.cholesky_solve(right, damped_factor(inner, ridge))
        return _on_support(transposed_times(gradients, dual, inner.dtype), weights, keep)
    inverse = damped_factor_inverse(inner, ridge)
    solved = transposed_times(gradients, _solved(inverse, right), inner.dtype)
    moved = _on_support(solved, weights, keep)
    left = wide(whitened_squares(inverse.to(gradients), gradients)).neg_().add_(1.0)
    return moved._replace(diagonal=bounded_shares(left, inner, ridge).div_(damping))


def joint_directions_from_kept(
    gradients: Gradients,
    damping: float,
    weights: Tensor,
    keep: Tensor,
    kept: int,
    *,
    change: Tensor | None = None,
    descent: bool = True,
    diagonal: bool = False,
) -> Directions:
    """The same as least squares over the kept weights, whose columns are copied side by side.

    The cheaper form where no block keeps more weights than there are samples.

    Args:
        gradients: ``[blocks, N, B]``.
        damping: ``λ > 0``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, ``False`` for ``P``.
        kept: Most entries that a block keeps.
        change: ``Gw``, ``[blocks, N]``, if already computed; taken in its dtype alone.
        descent: Whether to compute the first-order part.
        diagonal: Whether to compute that of ``F_KK⁻¹``.
    """
    if diagonal:  # so that its factor has halves
        kept = min(-(-kept // 8) * 8, keep.shape[-1])
    ridge, (indices, valid) = gradients.shape[-2] * damping, _positions(keep, kept)
    # Padding has columns of zero, which solve to zero.
    columns = chosen_columns(gradients, indices) * valid.unsqueeze(1)
    inner = damped_gram(columns.mT, ridge)
    columns = in_dtype(columns, inner.dtype)
    if change is None or change.dtype != inner.dtype:
        residual = removed_change(gradients, weights, keep, inner.dtype)
    else:  # G_P w_P = Gw − G_K w_K
        residual = change - times_vector(columns, weights.gather(-1, indices), inner.dtype)
    right = transposed_times(columns, _right_hand_side(residual, descent), inner.dtype)
    places, share = indices.to(inner.device), None
    if diagonal:
        inverse = damped_factor_inverse(inner, ridge)
        solved = _solved(inverse, right)
        values = bounded_shares(wide(inverse.square_().sum(-2)).mul_(ridge), inner, ridge)
        share = values.new_ones(keep.shape).scatter_(1, places, values).div_(damping)
    else:
        solved = torch.cholesky_solve(right, damped_factor(inner, ridge))
    moved = solved.new_zeros((*keep.shape, solved.shape[-1]))
    moved.scatter_(1, places.unsqueeze(-1).expand_as(solved), solved)
    return _on_support(moved, weights, keep)._replace(diagonal=share)


def _positions(keep: Tensor, most: int) -> tuple[Tensor, Tensor]:
    # Indices of the kept entries of each block, padded to the longest; `valid` marks the real. The
    # padding is the place of a pruned entry, where nothing is kept.
    blocks, size = keep.shape
    rank = keep.cumsum(-1, dtype=torch.int32)
    place = torch.where(keep, rank - 1, most).long()
    padding = keep.to(torch.uint8).argmin(-1, keepdim=True)
    order = padding.repeat(1, most + 1)
    order.scatter_(1, place, torch.arange(size, device=keep.device).expand(blocks, size))
    return order[:, :most], torch.arange(most, device=keep.device) < rank[:, -1:]


def _solved(inverse: Tensor, right: Tensor) -> Tensor:
    """``(LLᵀ)⁻¹R`` from ``L⁻¹``; products with single columns are slow."""
    columns = [(inverse * column.unsqueeze(-2)).sum(-1) for column in right.unbind(-1)]
    return (torch.stack(columns, dim=-2) @ inverse).mT


def _right_hand_side(residual: Tensor, descent: bool) -> Tensor:
    columns = [residual, -torch.ones_like(residual)]
    return torch.stack(columns if descent else columns[:1], dim=-1)  # [blocks, N, 2 or 1]


def _on_support(moved: Tensor, weights: Tensor, keep: Tensor) -> Directions:
    # In place on ``moved``, [blocks, B, 2 or 1]: allocating memory costs more than the arithmetic.
    removed = torch.where(keep, 0.0, weights).to(moved)
    moved.masked_fill_(~keep.to(moved.device).unsqueeze(-1), 0.0)
    moved[..., 0] -= removed
    newton = moved[..., 1] if moved.shape[-1] > 1 else moved.new_zeros(()).expand(keep.shape)
    return Directions(moved[..., 0], newton)
