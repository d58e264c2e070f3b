"""Local search for what to prune: swap pruned and kept entries while an objective falls.

Legend, batched over ``blocks``: ``G`` gradients ``[blocks, N, B]``, ``λ`` damping, ``w`` weights,
``P`` pruned and ``K`` kept entries, ``a_k = w_k g_k`` the change of the N losses that one weight
makes, and ``r = Σ_{k∈P} a_k`` the residual. With the Fisher ``F = λI + GᵀG/N`` in the place of the
Hessian, pruning ``P`` without moving the others raises the loss by half of

    Q(P) = Σ_{i,j∈P} w_i F_ij w_j = ‖r‖²/N + λ‖w_P‖²,

which is small where the pruned weights cancel one another (CBS, arXiv 2203.04466). Only ``r`` is
kept, never ``F``. Restoring ``i`` and pruning ``j`` changes ``N Q`` by

    Δ_ij = β_j − α_i − 2a_iᵀa_j,   α_i = 2a_iᵀr − ‖a_i‖² + Nλw_i²,   β_j = 2a_jᵀr + ‖a_j‖² + Nλw_j².
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from torchprune_bayes._numerics.fisher_blocks import times


def selection_objective(
    gradients: Tensor, weights: Tensor, keep: Tensor, damping: float = 0.0
) -> Tensor:
    """``Q(P) = ‖Σ_{k∈P} w_k g_k‖²/N + λ‖w_P‖²`` of each block, float64 ``[blocks]``.

    Args:
        gradients: ``[blocks, N, B]``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, ``False`` for ``P``.
        damping: ``λ >= 0``.

    Example:
        >>> cancelling = torch.tensor([[[1.0, -1.0, 3.0]]])
        >>> keep = torch.tensor([[False, False, True]])
        >>> selection_objective(cancelling, torch.ones(1, 3), keep)
        tensor([0.], dtype=torch.float64)
    """
    removed = torch.where(keep, 0.0, weights.double())
    residual = times(gradients, removed.unsqueeze(-1)).squeeze(-1)
    return residual.square().mean(-1) + damping * removed.square().sum(-1)


def local_search(
    gradients: Tensor,
    weights: Tensor,
    keep: Tensor,
    *,
    damping: float = 0.0,
    epsilon: float = 1e-4,
    swap_range: int = 512,
    max_no_match: int = 3,
    max_iterations: int = 100,
    groups: Tensor | None = None,
) -> Iterator[Tensor]:
    """Swap entries of ``P`` and ``K`` while that lowers ``Q``; all blocks at once.

    Each iteration refreshes ``α`` and ``β`` of all entries with one product, takes the
    ``swap_range`` best of either side, computes all inner products among them with one more, and
    then accepts swap after swap, each the best of all pairs given those accepted before. Where a
    block has no swap left, its next iteration looks at the next ranks.

    Laws: every accepted swap lowers ``Q``; ``|P|`` of each block stays.

    Args:
        gradients: ``[blocks, N, B]``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, the start.
        damping: ``λ >= 0``; the paper searches without.
        epsilon: Smallest gain of a swap, as a share of the ``Q`` of its block.
        swap_range: Entries ``T`` of either side that are paired, all with all.
        max_no_match: Iterations in a row without a swap after which a block is done.
        max_iterations: Iterations at most.
        groups: Integers ``[blocks, B]``; entries are swapped only where these are equal.

    Yields:
        The kept entries after every iteration that swapped any, ``[blocks, B]``.

    Cost per iteration and block: ``2NB`` operations to refresh, ``8NT²`` for the products, ``3T²``
    per accepted swap; ``O(N + B + T²)`` of memory.

    Example:
        >>> gradients = torch.tensor([[[1.0, -1.0, 3.0]]])
        >>> start = torch.tensor([[True, False, False]])
        >>> list(local_search(gradients, torch.ones(1, 3), start))
        [tensor([[False, False,  True]])]
    """
    state = _State.start(gradients, weights, keep, damping)
    size = min(swap_range, int(keep.sum(-1).max()), int((~keep).sum(-1).max()))
    misses = torch.zeros(len(keep), dtype=torch.long, device=keep.device)
    for _ in range(max_iterations if size else 0):
        tile = state.tile(size, misses)
        inner, linear = state.products(tile.indices)
        allowed = tile.exists if groups is None else tile.exists & _same_group(groups, tile)
        signs = _accept_swaps(inner, linear, allowed, epsilon * state.objective())
        swapped = signs.any(-1)
        misses = torch.where(swapped, 0, misses + 1)
        if swapped.any():
            state.swap(tile.indices, signs)
            yield state.keep
        elif bool((misses >= max_no_match).all()):
            return


class _Tile(NamedTuple):
    """``T`` entries to restore, then ``T`` to prune, ``[blocks, 2T]``, and which pairs exist."""

    indices: Tensor
    exists: Tensor


@dataclass
class _State:
    """Where a search stands; ``ridge`` is ``Nλw²``."""

    gradients: Tensor
    weights: Tensor
    keep: Tensor
    residual: Tensor
    ridge: Tensor

    @classmethod
    def start(cls, gradients: Tensor, weights: Tensor, keep: Tensor, damping: float) -> _State:
        removed = torch.where(keep, 0.0, weights.double())
        residual = times(gradients, removed.unsqueeze(-1)).squeeze(-1)
        ridge = gradients.shape[-2] * damping * weights.double().square()
        return cls(gradients, weights, keep, residual, ridge)

    def objective(self) -> Tensor:
        """``N Q``, ``[blocks]``."""
        return self.residual.square().sum(-1) + self.ridge.masked_fill(self.keep, 0.0).sum(-1)

    def tile(self, size: int, misses: Tensor) -> _Tile:
        """The best of either side, or the next best after ``misses`` tiles of them."""
        # These products only rank; what is accepted is computed in float64.
        along = self.residual.to(self.gradients.dtype).unsqueeze(-2) @ self.gradients
        double = 2.0 * self.weights * along.squeeze(-2)
        own = self.weights.square() * self._column_squares + self.ridge
        restore = (double - own + 2.0 * self.ridge).masked_fill(self.keep, -torch.inf)
        prune = (-double - own).masked_fill(~self.keep, -torch.inf)
        ranks = size * misses.unsqueeze(-1) + torch.arange(size, device=misses.device)
        reach = min(int(ranks.max()) + 1, self.keep.shape[-1])
        sides = [
            gains.topk(reach).indices.gather(-1, ranks.clamp_max(reach - 1))
            for gains in (restore, prune)
        ]
        counts = ((~self.keep).sum(-1, keepdim=True), self.keep.sum(-1, keepdim=True))
        there = [ranks < count for count in counts]
        return _Tile(torch.cat(sides, -1), there[0].unsqueeze(-1) & there[1].unsqueeze(-2))

    def products(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """``a_iᵀa_j`` among a tile and ``a_iᵀr``, as if ``√(Nλ) w`` were rows of ``G diag(w)``."""
        blocks, size = indices.shape
        inner = self.residual.new_zeros(blocks, size, size)
        linear = self.residual.new_zeros(blocks, size)
        for rows, columns in self._columns(indices):
            inner += columns.mT @ columns
            linear += (self.residual[:, None, rows] @ columns).squeeze(-2)
        ridge = self.ridge.gather(-1, indices)
        inner.diagonal(dim1=-2, dim2=-1).add_(ridge)
        linear[:, : size // 2] += ridge[:, : size // 2]  # only the pruned are in r
        return inner, linear

    def swap(self, indices: Tensor, signs: Tensor) -> None:
        """Restore where the sign is −1, prune where it is +1."""
        swapped = torch.zeros_like(self.keep).scatter(-1, indices, signs != 0)
        self.keep = self.keep ^ swapped
        changes = [
            (columns @ signs.unsqueeze(-1)).squeeze(-1) for _, columns in self._columns(indices)
        ]
        self.residual = self.residual + torch.cat(changes, dim=-1)

    @cached_property
    def _column_squares(self) -> Tensor:
        return torch.linalg.vector_norm(self.gradients, dim=-2).square()

    def _columns(self, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
        # The columns a_k in float64, a few rows at a time: never more than a square of them.
        scale = self.weights.double().gather(-1, indices).unsqueeze(-2)
        step = indices.shape[-1]
        for start in range(0, self.gradients.shape[-2], step):
            rows = self.gradients[:, start : start + step]
            chosen = rows.gather(-1, indices.unsqueeze(-2).expand(-1, rows.shape[-2], -1))
            yield slice(start, start + step), chosen * scale


def _same_group(groups: Tensor, tile: _Tile) -> Tensor:
    restore, prune = groups.gather(-1, tile.indices).chunk(2, dim=-1)
    return restore.unsqueeze(-1) == prune.unsqueeze(-2)


def _accept_swaps(inner: Tensor, linear: Tensor, allowed: Tensor, threshold: Tensor) -> Tensor:
    """Accept the best swap of each block until none gains more than ``threshold``.

    Args:
        inner: ``a_iᵀa_j``, ``[blocks, 2T, 2T]``.
        linear: ``a_iᵀr``, ``[blocks, 2T]``.
        allowed: Boolean ``[blocks, T, T]``, the pairs that may be swapped.
        threshold: Gain that a swap must exceed, in units of ``‖r‖²``, ``[blocks]``.

    Returns:
        ``−1`` for the restored, ``+1`` for the pruned, else 0, float64 ``[blocks, 2T]``.
    """
    size = inner.shape[-1] // 2
    block = torch.arange(len(inner), device=inner.device)
    squares = inner.diagonal(dim1=-2, dim2=-1)
    alpha, beta = (2.0 * linear - squares)[:, :size], (2.0 * linear + squares)[:, size:]
    change = beta.unsqueeze(-2) - alpha.unsqueeze(-1) - 2.0 * inner[:, :size, size:]
    change.masked_fill_(~allowed, torch.inf)
    signs = torch.zeros_like(linear)
    while True:
        least, pair = change.flatten(1).min(-1)
        accepted = block[least < -threshold]
        if not len(accepted):
            return signs
        i, j = pair[accepted] // size, pair[accepted] % size
        signs[accepted, i], signs[accepted, size + j] = -1.0, 1.0
        # Both change r, by a_j − a_i, and with it α and β of the whole tile.
        shift = 2.0 * (inner[accepted, size + j] - inner[accepted, i])
        change[accepted] += shift[:, None, size:] - shift[:, :size, None]
        change[accepted, i, :] = torch.inf
        change[accepted, :, j] = torch.inf
