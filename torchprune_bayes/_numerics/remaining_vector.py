"""The remaining entries of several tensors seen as one vector."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from torchprune_bayes.types import Masks


class RemainingVector:
    """Order of the remaining entries: tensor by tensor, row-major within each.

    Args:
        masks: Boolean masks, ``True`` where an entry takes part.

    Attributes:
        numel: Length ``D`` of the vector.
        sizes: Number of remaining entries per tensor, in order.

    Example:
        >>> masks = {"a": torch.tensor([True, False, True]), "b": torch.tensor([[True]])}
        >>> remaining = RemainingVector(masks)
        >>> remaining.gather({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([[4.0]])})
        tensor([1., 3., 4.])
        >>> remaining.scatter(torch.tensor([5.0, 6.0, 7.0]))["a"]
        tensor([5., 0., 6.])
        >>> remaining.overlap(1, 3)
        [('a', 1, 2), ('b', 0, 1)]
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        counts = [torch.count_nonzero(mask) for mask in masks.values()]  # one read from the device
        self.sizes: list[int] = torch.stack(counts).tolist() if counts else []
        self._full = {
            name: size == mask.numel()
            for (name, mask), size in zip(masks.items(), self.sizes, strict=True)
        }
        self._offsets = [0, *accumulate(self.sizes)]
        self.numel = self._offsets[-1]

    def entries(self, name: str, values: Tensor) -> Tensor:
        """Remaining entries of one tensor ``[..., *shape]``, flattened to ``[..., remaining]``."""
        flat = values.flatten(values.ndim - self.masks[name].ndim)
        if self._full[name]:
            return flat
        return flat[..., self.masks[name].reshape(-1).to(values.device)]

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join the remaining entries of ``tensors`` into one vector ``[D]``."""
        return torch.cat([self.entries(name, tensors[name]) for name in self.masks])

    def scatter(self, vector: Tensor, fill: float = 0.0) -> dict[str, Tensor]:
        """Split a vector ``[D]`` into tensors, with ``fill`` where an entry is not remaining."""
        parts = vector.split(self.sizes)
        return {
            name: self._spread(name, part, fill)
            for name, part in zip(self.masks, parts, strict=True)
        }

    def overlap(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Tensors that the range ``start:stop`` touches, with the range inside each."""
        touched = []
        for name, first, size in zip(self.masks, self._offsets, self.sizes, strict=False):
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                touched.append((name, low, high))
        return touched

    def _spread(self, name: str, piece: Tensor, fill: float) -> Tensor:
        mask = self.masks[name].to(piece.device)
        if self._full[name]:
            return piece.reshape(mask.shape)
        return piece.new_full(mask.shape, fill).masked_scatter_(mask, piece)
