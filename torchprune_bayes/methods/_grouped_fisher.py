"""The empirical Fisher with the groups of a pattern one after another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._numerics.grouped_vector import GroupedVector
from torchprune_bayes._numerics.partition import partition
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.types import Masks


class GroupedFisher(EmpiricalFisher):
    """An :class:`EmpiricalFisher` of all entries, in the order of a :class:`GroupedVector`.

    Blocks hold whole groups. Entries that are pruned already take part with gradients of zero.

    Args:
        dims: The dimension of the groups in each tensor.
        size: Entries of a group; divides the length of every tensor along its dimension.
        options: As of :class:`EmpiricalFisher`.
    """

    def __init__(self, dims: Mapping[str, int], size: int, **options: Any) -> None:
        super().__init__(**options | {"active_only": False})
        self.dims, self.size = dims, size

    def fit(
        self,
        calibration: Calibration,
        weights: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
    ) -> GroupedFisher:
        """As :meth:`EmpiricalFisher.fit`; kept gradients are copied once to be reordered."""
        super().fit(calibration, weights, masks)
        row_major, alive = self.live, self._alive
        self.live = GroupedVector(row_major.masks, self.dims)
        if self.live.is_row_major:
            return self
        assert alive is not None
        order = self.live.gather(row_major.scatter(torch.arange(len(alive), device=alive.device)))
        self._alive = alive[order]
        if self._gradients is not None:
            self._gradients = self._gradients[:, order.to(self._gradients.device)]
        return self

    def restricted(self, masks: Masks, damping: float) -> EmpiricalFisher:
        """As :meth:`EmpiricalFisher.restricted`, which copies; not where nothing more is pruned."""
        alive = self.live.gather(masks)
        if self._alive is None or not torch.equal(alive, self._alive.to(alive.device)):
            return super().restricted(masks, damping)
        other = copy.copy(self)
        other.damping = damping
        return other

    def _cut(self) -> list[tuple[int, int]]:
        blocks = super()._cut()
        largest = max(stop - start for start, stop in blocks)
        if largest % self.size == 0:
            return blocks
        whole = max(largest // self.size, 1) * self.size
        return partition(self.live.sizes, whole, across_tensors=self.across_tensors)
