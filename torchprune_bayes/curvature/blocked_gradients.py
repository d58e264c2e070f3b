"""Gradients of the remaining entries, cut into blocks and read a few blocks at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchprune_bayes._numerics.fisher_blocks import SampleSpace, in_sample_space
from torchprune_bayes._numerics.gradient_tiles import Gradients, TiledGradients, times_vector
from torchprune_bayes._numerics.obs import kept_inner
from torchprune_bayes._numerics.partition import runs_of_equal_size
from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.curvature.gradient_store import GradientStore
from torchprune_bayes.memory import MemoryBudget

_CACHED_BYTES = 1 << 23  # of blocks whose float64 copies stay in a processor's cache


@dataclass
class SharedProducts:
    """Products of the gradients that are shared by several dampings.

    Attributes:
        spaces: ``GGᵀ`` of batches of blocks, by their start.
        kept: The kept entries of a single block, boolean ``[D]``, and ``G_K G_Kᵀ``.
        runs: Start, number and size of consecutive blocks of one size.
        diagonal: The kept entries, boolean ``[D]``, a damping, and the diagonal of the inverse of
            what is kept of small blocks, ``[D]``.
        weights: The weights ``[D]`` whose ``changes`` are known.
        changes: ``Gw`` of batches of blocks, in the gradients' dtype, by their start.
    """

    spaces: dict[int, SampleSpace] = field(default_factory=dict)
    kept: tuple[Tensor, Tensor] | None = None
    runs: list[tuple[int, int, int]] | None = None
    diagonal: tuple[Tensor, float, Tensor] | None = None
    weights: Tensor | None = None
    changes: dict[int, Tensor] = field(default_factory=dict)

    def change(self, where: slice, gradients: Gradients, weights: Tensor) -> Tensor:
        """``Gw`` of a batch of blocks, cached for the same weights ``[D]``."""
        if self.weights is not weights:
            self.weights, self.changes = weights, {}
        if where.start not in self.changes:
            part = weights[where].unflatten(0, gradients.shape[::2])
            self.changes[where.start] = times_vector(gradients, part, gradients.dtype)
        return self.changes[where.start]

    def inner_of(self, keep: Tensor) -> Tensor | None:
        """``G_K G_Kᵀ``, if it is cached."""
        if self.kept is None or not torch.equal(self.kept[0], keep):
            return None
        return self.kept[1]

    def diagonal_of(self, keep: Tensor, damping: float) -> Tensor | None:
        """Diagonal of the inverse of what ``keep`` keeps, of its entries, if it is cached."""
        if self.diagonal is None or self.diagonal[1] != damping:
            return None
        return self.diagonal[2][keep] if torch.equal(self.diagonal[0], keep) else None


class BlockedGradients:
    """``N`` gradients of ``D`` remaining entries in blocks of ``B``.

    Attributes:
        remaining: Order of the entries.
        store: Their gradients ``[N, D]``.
        count: ``N``.
        blocks: Ranges ``(start, stop)`` of the blocks in this order.
        budget: Memory budget for reading and computing.
        products: Products that are cached between sweeps.
    """

    remaining: RemainingVector
    store: GradientStore
    count: int
    blocks: list[tuple[int, int]]
    budget: MemoryBudget
    products: SharedProducts

    def sweep(self) -> Iterator[tuple[slice, Gradients]]:
        """Yield batches of equally large blocks of the gradients.

        Yields:
            The range of the vector, and its gradients ``[blocks, N, B]``; a block that is larger
            than the budget's share is read tile by tile.
        """
        for where, size in self._batches():
            if where.stop - where.start == size:
                yield where, self.block(where.start, where.stop)
            else:
                rows = self.store.read(where.start, where.stop)
                yield where, rows.unflatten(1, (-1, size)).transpose(0, 1)

    def _batches(self) -> Iterator[tuple[slice, int]]:
        """Ranges of the vector with blocks of one size, and that size."""
        for start, number, size in self.runs:
            step = max(self._entries_at_once // size, 1) * size
            stop = start + number * size
            for begin in range(start, stop, step):
                yield slice(begin, min(begin + step, stop)), size

    def whole_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """As :meth:`sweep`, with all gradients of the blocks in one tensor each."""
        for where, gradients in self.sweep():
            if isinstance(gradients, Tensor):
                yield where, gradients
            else:
                yield where, self.store.read(where.start, where.stop).unsqueeze(0)

    def block(self, start: int, stop: int) -> Gradients:
        """Gradients of one block, ``[1, N, B]``, read when they are needed if it is large."""
        store = self.store
        if stop - start <= self._entries_at_once or self.in_place:
            return store.read(start, stop).unsqueeze(0)
        return TiledGradients(
            lambda first, last: store.read(start + first, start + last),
            (1, self.count, stop - start),
            store.dtype,
            store.device,
        )

    def space_of(self, where: slice, gradients: Gradients) -> SampleSpace | None:
        """``GGᵀ`` of a batch of blocks from :meth:`sweep`, cached for later sweeps.

        ``None`` if it would not be used, or if all would take more than their share of the
        budget; that of a single block is always cached.
        """
        spaces = self.products.spaces
        if where.start in spaces:
            return spaces[where.start]
        if not in_sample_space(gradients):
            return None
        held = sum(space.inner.nbytes for space in spaces.values())
        needed = 8 * gradients.shape[0] * self.count**2
        if len(self.blocks) > 1 and held + needed > self.budget.factor_bytes:
            return None
        squares = self.count * self.remaining.numel * gradients.dtype.itemsize
        space = SampleSpace.of(gradients, keep_squares=squares <= self.budget.factor_bytes)
        return spaces.setdefault(where.start, space)

    def kept_inner(self, gradients: Gradients, keep: Tensor, kept: int) -> Tensor | None:
        """``G_K G_Kᵀ`` of a single block, cached for the next damping and restriction.

        Args:
            gradients: Gradients of the block.
            keep: Boolean ``[1, B]``.
            kept: Number of kept entries.
        """
        if len(self.blocks) > 1 or kept <= self.count:
            return None
        inner = self.products.inner_of(keep[0])
        if inner is None:
            space = self.products.spaces.get(0)
            known = None if space is None else space.inner
            inner = kept_inner(gradients, keep, kept, known)
            self.products.kept = keep[0].clone(), inner
        return inner

    def most_kept(self, keep: Tensor) -> dict[int, int]:
        """Most entries of a block that ``keep`` (boolean ``[D]``) keeps.

        Of every batch of blocks from :meth:`sweep`, by its start.
        """
        batches = list(self._batches())
        most = [torch.count_nonzero(keep[at].view(-1, size), dim=1).amax() for at, size in batches]
        counts: list[int] = torch.stack(most).tolist()  # the device is asked once for all
        return {where.start: count for (where, _), count in zip(batches, counts, strict=True)}

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """Start, number and size of consecutive blocks of one size."""
        if self.products.runs is None:
            self.products.runs = list(runs_of_equal_size(self.blocks))
        return self.products.runs

    @property
    def in_small_blocks(self) -> bool:
        """Whether blocks are many, each is read at once, and no entry counts as zero."""
        largest = max(size for _, _, size in self.runs)
        small = len(self.blocks) > 1 and largest <= self._entries_at_once
        return small and self.store.active is None

    @property
    def in_place(self) -> bool:
        """Whether a range of columns is a view of memory, however large."""
        store = self.store
        plain = store.columns is None and store.active is None and store.rows.dtype == store.dtype
        return plain and store.rows.device == store.device

    @property
    def _entries_at_once(self) -> int:
        # With their products in float64, and for small blocks the factors.
        room = self.budget.block_bytes
        if self.store.device.type == "cpu":
            room = min(room, _CACHED_BYTES)
        return max(room // (8 * self.count), 1)
