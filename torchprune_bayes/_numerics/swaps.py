"""Local search for what to prune: swap pruned and kept entries while an objective falls.

Legend, batched over ``blocks``: ``G`` gradients ``[blocks, N, B]``, ``λ`` damping,
``F = λI + GᵀG/N``, ``w`` weights, ``P`` pruned and ``K`` kept entries, ``T`` the tile's side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from torchprune_bayes._numerics.gradient_tiles import mean_squares

_CONVERTED = 1 << 18  # entries


class Tile(NamedTuple):
    """Entries to restore, the rows, then entries to prune, the columns; at most ``T`` of each."""

    indices: Tensor
    """``[blocks, rows + columns]``."""
    allowed: Tensor
    """Boolean ``[blocks, rows, columns]``: which pairs may be swapped."""


class SwapObjective(ABC):
    """Something to lower by swaps, and where the search for it stands.

    Args:
        gradients: ``[blocks, N, B]``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, the start, ``False`` for ``P``.
        damping: ``λ``.
    """

    def __init__(self, gradients: Tensor, weights: Tensor, keep: Tensor, damping: float) -> None:
        self.gradients, self.weights, self.keep = gradients, weights.double(), keep
        self.damping = damping
        self.count = gradients.shape[-2]
        removed = torch.where(keep, 0.0, self.weights).unsqueeze(-1)
        # G_P w_P, converted to float64 a few rows at a time: O(B) beside the gradients.
        rows = gradients.split(max(_CONVERTED // keep.numel(), 1), dim=-2)
        self.residual = torch.cat([(r.double() @ removed).squeeze(-1) for r in rows], dim=-1)

    @abstractmethod
    def value(self) -> Tensor:
        """The objective, float64 ``[blocks]``."""

    @abstractmethod
    def gains(self) -> tuple[Tensor, Tensor]:
        """How promising each entry is to restore, and to prune, ``[blocks, B]``; ranks only."""

    @abstractmethod
    def accept(self, tile: Tile, threshold: Tensor) -> Tensor:
        """Accept the best swap of each block, given those before, until none helps enough.

        Args:
            tile: The pairs to choose from.
            threshold: How much a swap must lower the objective, ``[blocks]``.

        Returns:
            ``−1`` for the restored, ``+1`` for the pruned, else 0, as ``tile.indices``.
        """

    def swap(self, indices: Tensor, signs: Tensor) -> None:
        """Restore where the sign is −1, prune where it is +1."""
        # A sum, because entries that pad a tile come up more than once, with signs of zero.
        swapped = torch.zeros_like(self.weights).scatter_add(-1, indices, signs)
        self.keep = self.keep ^ (swapped != 0)
        weights = signs * self.weights.gather(-1, indices)
        changes = [
            (columns @ weights.unsqueeze(-1)).squeeze(-1) for _, columns in self.columns(indices)
        ]
        self.residual = self.residual + torch.cat(changes, dim=-1)

    def columns(self, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some columns of ``G`` in float64, a few rows at a time: never more than a square."""
        step = max(indices.shape[-1], 1)
        for start in range(0, self.count, step):
            rows = self.gradients[:, start : start + step]
            chosen = rows.gather(-1, indices.unsqueeze(-2).expand(-1, rows.shape[-2], -1))
            yield slice(start, start + step), chosen.double()


def swap_search(
    objective: SwapObjective,
    *,
    epsilon: float = 1e-4,
    swap_range: int = 128,
    max_no_match: int = 3,
    max_iterations: int = 100,
    groups: Tensor | None = None,
    within: int | None = None,
) -> Iterator[Tensor]:
    """Swap entries of ``P`` and ``K`` while that lowers the objective; all blocks at once.

    Each iteration refreshes the gains of all entries, takes the ``swap_range`` best of either side,
    and accepts swap after swap, each the best of all their pairs given those accepted before. A
    block without an accepted swap pairs the next best of one side with the best of the other, and
    so on.

    Laws: every accepted swap lowers the objective; ``|P|`` of each block is unchanged.

    Args:
        objective: What to lower, with the start.
        epsilon: Smallest gain of a swap, as a share of the objective of its block.
        swap_range: Entries ``T`` of either side that are paired, all with all.
        max_no_match: Iterations in a row without a swap after which a block is done.
        max_iterations: Iterations at most.
        groups: Integers ``[blocks, B]``; entries are swapped only where these are equal.
        within: Swap only within every so many consecutive entries, a divisor of ``B``.

    Yields:
        The kept entries after every iteration that swapped any, ``[blocks, B]``.

    Example:
        >>> gradients = torch.tensor([[[1.0, -1.0, 3.0]]])
        >>> start = torch.tensor([[True, False, False]])
        >>> list(swap_search(SelectionObjective(gradients, torch.ones(1, 3), start)))
        [tensor([[False, False,  True]])]
    """
    misses = torch.zeros(len(objective.keep), 1, dtype=torch.long, device=objective.keep.device)
    for _ in range(max_iterations):
        if within is None:
            tile = _tile(objective, swap_range, misses, groups)
        else:
            tile = _tile_of_groups(objective, swap_range, misses, groups, within)
        signs = objective.accept(tile, epsilon * objective.value())
        swapped = signs.any(-1, keepdim=True)
        misses = torch.where(swapped, 0, misses + 1)
        both = torch.stack([swapped.any(), (misses >= max_no_match).all()])
        any_swapped, done = both.tolist()  # fetched from the device together
        if any_swapped:
            objective.swap(tile.indices, signs)
            yield objective.keep
        elif done:
            return


class SelectionObjective(SwapObjective):
    """What pruning ``P`` costs while the others stay: the problem of CBS-S (arXiv 2203.04466).

    ``Q(P) = Σ_{i,j∈P} w_i F_ij w_j = ‖r‖²/N + λ‖w_P‖²`` with the residual ``r = G_P w_P``, small
    where the pruned weights cancel one another. With ``a_k = w_k g_k``, restoring ``i`` and pruning
    ``j`` changes ``N Q`` by ``β_j − α_i − 2a_iᵀa_j``, where ``α_i = 2a_iᵀr − ‖a_i‖² + Nλw_i²`` and
    ``β_j = 2a_jᵀr + ‖a_j‖² + Nλw_j²``.

    Cost per iteration and block: ``2NB`` operations to refresh, ``8NT²`` for the products, ``3T²``
    per accepted swap; ``O(N + B + T²)`` of memory.

    Args:
        gradients: ``[blocks, N, B]``.
        weights: ``[blocks, B]``.
        keep: Boolean ``[blocks, B]``, the start, ``False`` for ``P``.
        damping: ``λ >= 0``; the paper searches without.

    Example:
        >>> cancelling = torch.tensor([[[1.0, -1.0, 3.0]]])
        >>> keep = torch.tensor([[False, False, True]])
        >>> SelectionObjective(cancelling, torch.ones(1, 3), keep).value()
        tensor([0.], dtype=torch.float64)
    """

    def __init__(
        self, gradients: Tensor, weights: Tensor, keep: Tensor, damping: float = 0.0
    ) -> None:
        super().__init__(gradients, weights, keep, damping)
        self.ridge = self.count * damping * self.weights.square()  # N λ w²

    def value(self) -> Tensor:
        """``Q(P)`` of each block."""
        own = self.ridge.masked_fill(self.keep, 0.0).sum(-1)
        return (self.residual.square().sum(-1) + own) / self.count

    def gains(self) -> tuple[Tensor, Tensor]:
        """``α`` and ``−β``."""
        along = self.residual.to(self.gradients).unsqueeze(-2) @ self.gradients
        double = 2.0 * self.weights * along.squeeze(-2)
        return double - self._squares + self.ridge, -double - self._squares - self.ridge

    @cached_property
    def _squares(self) -> Tensor:
        return self.weights.square() * (mean_squares(self.gradients) * self.count)

    def accept(self, tile: Tile, threshold: Tensor) -> Tensor:
        """Accept swaps by the exact change of ``Q``, of all pairs at once."""
        rows = tile.allowed.shape[-2]
        inner, linear = self._products(tile.indices, rows)
        squares = inner.diagonal(dim1=-2, dim2=-1)
        alpha, beta = (2.0 * linear - squares)[:, :rows], (2.0 * linear + squares)[:, rows:]
        change = beta.unsqueeze(-2) - alpha.unsqueeze(-1) - 2.0 * inner[:, :rows, rows:]
        change.masked_fill_(~tile.allowed, torch.inf)
        signs = torch.zeros_like(linear)
        while (swap := best_pairs(change, self.count * threshold)) is not None:
            block, i, j = swap
            signs[block, i], signs[block, rows + j] = -1.0, 1.0
            # Both change r, by a_j − a_i, and with it α and β of the whole tile.
            shift = 2.0 * (inner[block, rows + j] - inner[block, i])
            change[block] += shift[:, None, rows:] - shift[:, :rows, None]
            change[block, i, :] = torch.inf
            change[block, :, j] = torch.inf
        return signs

    def _products(self, indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        # a_iᵀa_j among the tile and a_iᵀr, as if √(Nλ) w stood below G diag(w) as more rows.
        blocks, size = indices.shape
        inner = self.residual.new_zeros(blocks, size, size)
        linear = self.residual.new_zeros(blocks, size)
        scale = self.weights.gather(-1, indices)
        for where, columns in self.columns(indices):
            columns *= scale.unsqueeze(-2)
            inner += columns.mT @ columns
            linear += (self.residual[:, None, where] @ columns).squeeze(-2)
        ridge = self.ridge.gather(-1, indices)
        inner.diagonal(dim1=-2, dim2=-1).add_(ridge)
        linear[:, :rows] += ridge[:, :rows]  # only the pruned are in r
        return inner, linear


def best_pairs(change: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Blocks whose best pair lowers the objective by more than ``threshold``, and the pairs.

    Args:
        change: ``[blocks, rows, columns]``.
        threshold: ``[blocks]``.

    Returns:
        Blocks, rows and columns, or ``None`` if there are none.
    """
    if not change.numel():
        return None
    least, pair = change.flatten(1).min(-1)
    block = (least < -threshold).nonzero().squeeze(-1)
    if not len(block):
        return None
    columns = change.shape[-1]
    return block, pair[block] // columns, pair[block] % columns


def _tile(objective: SwapObjective, size: int, misses: Tensor, groups: Tensor | None) -> Tile:
    keep = objective.keep
    restore, prune = objective.gains()
    # Lots of rows and columns in the order (0, 0), (0, 1), (1, 0), (0, 2), (1, 1), ...
    diagonal = ((torch.sqrt(8.0 * misses + 1.0) - 1.0) / 2.0).long()
    lot = misses - diagonal * (diagonal + 1) // 2
    rows, row_exists = _ranked(restore, ~keep, size, lot)
    columns, column_exists = _ranked(prune, keep, size, diagonal - lot)
    allowed = row_exists.unsqueeze(-1) & column_exists.unsqueeze(-2)
    if groups is not None:
        allowed &= groups.gather(-1, rows)[..., None] == groups.gather(-1, columns)[..., None, :]
    return Tile(torch.cat([rows, columns], dim=-1), allowed)


def _tile_of_groups(
    objective: SwapObjective, size: int, misses: Tensor, groups: Tensor | None, within: int
) -> Tile:
    # The groups with the best entry to restore and the best to prune; rows and columns are all
    # their entries, pairs those of a pruned with a kept one of the same group.
    keep = objective.keep
    free = torch.ones_like(keep) if groups is None else groups >= 0
    restore, prune = objective.gains()
    sides = [restore.masked_fill(keep | ~free, -torch.inf), prune.masked_fill(~keep, -torch.inf)]
    best = torch.stack([side.unflatten(-1, (-1, within)).amax(-1) for side in sides]).sum(0)
    chosen, exists = _ranked(best, best.isfinite(), max(size // within, 1), misses)
    places = torch.arange(within, device=keep.device)
    entries = (chosen.unsqueeze(-1) * within + places).flatten(-2)
    pruned = (free & ~keep).gather(-1, entries) & exists.repeat_interleave(within, dim=-1)
    own = torch.arange(entries.shape[-1], device=keep.device) // within
    allowed = pruned.unsqueeze(-1) & keep.gather(-1, entries).unsqueeze(-2)
    allowed &= own.unsqueeze(-1) == own
    if groups is not None:
        same = groups.gather(-1, entries)
        allowed &= same.unsqueeze(-1) == same.unsqueeze(-2)
    return Tile(torch.cat([entries, entries], dim=-1), allowed)


def _ranked(gains: Tensor, side: Tensor, size: int, lot: Tensor) -> tuple[Tensor, Tensor]:
    # A lot of at most `size` entries of one side, in the order of their gains.
    entries, last = torch.stack([side.sum(-1).max(), lot.max()]).tolist()
    size = min(size, entries)
    ranks = size * lot + torch.arange(size, device=side.device)
    reach = min(size * (last + 1), side.shape[-1])
    order = gains.masked_fill(~side, -torch.inf).topk(reach).indices
    return order.gather(-1, ranks.clamp_max(reach - 1)), ranks < side.sum(-1, keepdim=True)
