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

from torchprune_bayes._numerics.cholesky import damped_factor
from torchprune_bayes._numerics.fisher_blocks import InverseFisher
from torchprune_bayes._numerics.gradient_tiles import (
    Gradients,
    chosen_columns,
    damped_gram,
    gram,
    mean,
    times_vector,
    transposed_times,
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

    Cost per block: ``N²m + m³/3`` with ``m = min(N, |K|)``.
    """
    kept = int(keep.sum(-1).max()) if kept is None else kept
    if needs_kept_columns(gradients, kept):
        return joint_directions_from_kept(
            gradients, damping, weights, keep, kept, change=change, descent=descent
        )
    return joint_directions_in_sample_space(
        gradients, damping, weights, keep, inner, descent=descent
    )


def needs_kept_columns(gradients: Gradients, kept: int) -> bool:
    """Whether the update is computed from the columns of the kept weights, copied side by side."""
    blocks, count, size = gradients.shape
    return kept <= count or (blocks > 1 and 4 * kept <= 3 * size)


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
) -> Directions:
    """``δ_K = G_Kᵀ(NλI + G_K G_Kᵀ)⁻¹R``: ridge regression with one unknown per sample.

    Args:
        gradients: ``[blocks, N, B]``.
        damping: ``λ > 0``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, ``False`` for ``P``.
        inner: ``G_K G_Kᵀ``, if already computed.
        descent: Whether to compute the first-order part.
    """
    ridge = gradients.shape[-2] * damping
    inner = damped_gram(gradients, ridge, keep) if inner is None else inner
    change = removed_change(gradients, weights, keep, inner.dtype)
    dual = torch.cholesky_solve(_right_hand_side(change, descent), damped_factor(inner, ridge))
    return _on_support(transposed_times(gradients, dual, inner.dtype), weights, keep)


def joint_directions_from_kept(
    gradients: Gradients,
    damping: float,
    weights: Tensor,
    keep: Tensor,
    kept: int,
    *,
    change: Tensor | None = None,
    descent: bool = True,
) -> Directions:
    """The same from the columns of the kept weights side by side, which are all it needs.

    In the form of least squares over the kept weights where they are fewer than the samples.

    Args:
        gradients: ``[blocks, N, B]``.
        damping: ``λ > 0``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, ``False`` for ``P``.
        kept: Most entries that a block keeps.
        change: ``Gw``, ``[blocks, N]``, if already computed; taken in its dtype alone.
        descent: Whether to compute the first-order part.
    """
    count, (indices, valid) = gradients.shape[-2], _positions(keep, kept)
    # Padding has columns of zero, which solve to zero.
    columns = chosen_columns(gradients, indices) * valid.unsqueeze(1)
    inner = damped_gram(columns.mT if kept <= count else columns, count * damping)
    dtype, factor = inner.dtype, damped_factor(inner, count * damping)
    columns = in_dtype(columns, dtype)
    if change is None or change.dtype != dtype:
        residual = removed_change(gradients, weights, keep, dtype)
    else:  # G_P w_P = Gw − G_K w_K
        residual = change - times_vector(columns, weights.gather(-1, indices), dtype)
    right = _right_hand_side(residual, descent)
    if kept <= count:
        solved = torch.cholesky_solve(transposed_times(columns, right, dtype), factor)
    else:
        solved = transposed_times(columns, torch.cholesky_solve(right, factor), dtype)
    moved = solved.new_zeros((*keep.shape, solved.shape[-1]))
    moved.scatter_(1, indices.to(solved.device).unsqueeze(-1).expand_as(solved), solved)
    return _on_support(moved, weights, keep)


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
