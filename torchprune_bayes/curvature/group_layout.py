"""An order of entries in which the groups of a pattern are consecutive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from torchprune_bayes._numerics.grouped_vector import GroupedVector
from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.curvature.gradient_store import GradientStore


@dataclass(frozen=True)
class GroupLayout:
    """The order of an N:M or 1xM pattern; blocks hold whole groups.

    Attributes:
        dims: The dimension of the groups in each tensor.
        size: Entries of a group; divides the length of every tensor along its dimension.
    """

    dims: Mapping[str, int]
    size: int

    def reordered(
        self, remaining: RemainingVector, store: GradientStore
    ) -> tuple[GroupedVector, GradientStore]:
        """The vector and its gradients in this order.

        Args:
            remaining: All entries, row by row.
            store: Gradients in that order.
        """
        grouped = GroupedVector(remaining.masks, self.dims)
        if grouped.is_row_major:
            return grouped, store
        masks = {name: mask.cpu() for name, mask in remaining.masks.items()}
        places = RemainingVector(masks).scatter(torch.arange(remaining.numel))
        return grouped, store.reordered(GroupedVector(masks, self.dims).gather(places))

    def block_size(self, blocks: Sequence[tuple[int, int]]) -> int | None:
        """The largest block size that holds whole groups, if that of ``blocks`` does not."""
        largest = max(stop - start for start, stop in blocks)
        return None if largest % self.size == 0 else max(largest // self.size, 1) * self.size
