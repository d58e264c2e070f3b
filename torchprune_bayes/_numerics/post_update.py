"""The true combinatorial objective: what pruning costs after the others have moved optimally.

Legend as in :mod:`~torchprune_bayes._numerics.swaps`. With ``A = NλI + G_K G_Kᵀ``, ``r = G_P w_P``
and ``z = w + GᵀA⁻¹r``, which holds the moved weights on ``K`` and the multipliers over ``λ`` on
``P``,

    Q*(P) = w_Pᵀ(F⁻¹_PP)⁻¹w_P = λ w_Pᵀz_P.

Let ``X = L⁻¹G`` with ``A = LLᵀ``. Restoring ``i`` alone lowers ``Q*/λ`` by ``z_i²/(1 + ‖x_i‖²)``,
pruning ``j`` alone raises it by ``z_j²/(1 − ‖x_j‖²)``, and with ``c = x_iᵀx_j`` the swap changes it
by

    −z_i²/(1 + ‖x_i‖²) + (z_j − c z_i/(1 + ‖x_i‖²))² / (1 − ‖x_j‖² + c²/(1 + ‖x_i‖²)).

A swap adds ``g_i g_iᵀ − g_j g_jᵀ`` to ``A``: a 2x2 Schur complement updates ``XᵀX`` and ``z``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import safe_cholesky
from torchprune_bayes._numerics.gradient_tiles import transposed_times
from torchprune_bayes._numerics.swaps import SwapObjective, Tile, best_pairs

_TILE = 8192


class PostUpdateObjective(SwapObjective):
    """``Q*(P)``, the rise of the quadratic model after the joint update (doubled).

    Cost per iteration and block: ``N²B + N³/3`` operations to refresh, ``6N²T + 8NT²`` for the
    products, ``20T²`` per accepted swap; ``O(N² + NT + B + T²)`` of memory.

    Args:
        gradients: ``[blocks, N, B]``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, the start, ``False`` for ``P``.
        damping: ``λ > 0``.

    Example:
        >>> alike = torch.tensor([[[1.0, 1.0]]])  # either weight can do the other's work
        >>> keep = torch.tensor([[True, False]])
        >>> PostUpdateObjective(alike, torch.ones(1, 2), keep, damping=1e-3).value() < 2e-3
        tensor([True])
    """

    def __init__(self, gradients: Tensor, weights: Tensor, keep: Tensor, damping: float) -> None:
        super().__init__(gradients, weights, keep, damping)
        inner = self.residual.new_zeros(len(keep), self.count, self.count)
        for part, kept in zip(gradients.split(_TILE, -1), keep.split(_TILE, -1), strict=True):
            wide = part.double() * kept.unsqueeze(-2)
            inner += wide @ wide.mT
        inner.diagonal(dim1=-2, dim2=-1).add_(self.count * damping)
        self._refresh(inner)

    def value(self) -> Tensor:
        """``Q*(P)`` of each block."""
        return self.damping * (self.weights * self.moved).masked_fill(self.keep, 0.0).sum(-1)

    def gains(self) -> tuple[Tensor, Tensor]:
        """Falls for restoring, and rises for pruning with a minus sign, of one entry alone."""
        factor = self.factor.to(self.gradients.dtype)
        squares = torch.cat(
            [
                torch.linalg.solve_triangular(factor, part, upper=False).square().sum(-2)
                for part in self.gradients.split(_TILE, dim=-1)
            ],
            dim=-1,
        ).double()
        own = self.moved.square()
        least = torch.finfo(self.gradients.dtype).eps
        return own / (1.0 + squares), -own / (1.0 - squares).clamp_min(least)

    def accept(self, tile: Tile, threshold: Tensor) -> Tensor:
        """Accept swaps by the exact change of ``Q*``, of all pairs at once."""
        rows, open_pairs = tile.allowed.shape[-2], tile.allowed.clone()
        columns = torch.cat([part for _, part in self.columns(tile.indices)], dim=-2)
        whitened = torch.linalg.solve_triangular(self.factor, columns, upper=False)
        inner = whitened.mT @ whitened
        weights, moved = (v.gather(-1, tile.indices) for v in (self.weights, self.moved))
        signs = torch.zeros_like(weights)
        while True:
            change = _changes(inner, moved, rows).masked_fill(~open_pairs, torch.inf)
            best = best_pairs(change, threshold / self.damping)
            if best is None:
                return signs
            block, i, j = best
            pair = torch.stack([i, rows + j], dim=-1)
            inner[block], moved[block] = _swapped(inner[block], moved[block], weights[block], pair)
            signs[block, i], signs[block, rows + j] = -1.0, 1.0
            open_pairs[block, i, :] = False
            open_pairs[block, :, j] = False

    def swap(self, indices: Tensor, signs: Tensor) -> None:
        """Restore where the sign is −1, prune where it is +1, and factorise again."""
        super().swap(indices, signs)
        columns = torch.cat([part for _, part in self.columns(indices)], dim=-2)
        self._refresh(self.inner - (columns * signs.unsqueeze(-2)) @ columns.mT)

    def _refresh(self, inner: Tensor) -> None:
        self.inner = inner  # A
        self.factor = safe_cholesky(inner)
        dual = torch.cholesky_solve(self.residual.unsqueeze(-1), self.factor)
        self.moved = self.weights + transposed_times(self.gradients, dual).squeeze(-1)  # z


def _changes(inner: Tensor, moved: Tensor, rows: int) -> Tensor:
    squares = inner.diagonal(dim1=-2, dim2=-1)
    restored = 1.0 + squares[:, :rows, None]
    cross = inner[:, :rows, rows:]
    left = moved[:, None, rows:] - cross * (moved[:, :rows, None] / restored)
    room = (1.0 - squares[:, None, rows:]) + cross.square() / restored
    return left.square() / room - moved[:, :rows, None].square() / restored


def _swapped(inner: Tensor, moved: Tensor, weights: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    # B = I + UDUᵀ with U = X_pair and D = diag(1, −1): B⁻¹ = I − U(D + UᵀU)⁻¹Uᵀ as D⁻¹ = D.
    sign = inner.new_tensor([1.0, -1.0])
    across = inner.gather(-1, pair.unsqueeze(-2).expand(-1, inner.shape[-2], -1))
    own = across.gather(-2, pair.unsqueeze(-1).expand(-1, -1, 2))
    # The residual loses a_i and gains a_j.
    step = -(sign * weights.gather(-1, pair)).unsqueeze(-1)
    dual = (moved - weights).unsqueeze(-1) + across @ step
    here = dual.gather(-2, pair.unsqueeze(-1))
    right = torch.cat([across.mT, here], dim=-1)
    solved = across @ torch.linalg.solve(own + torch.diag(sign), right)
    return inner - solved[..., :-1], weights + (dual - solved[..., -1:]).squeeze(-1)
