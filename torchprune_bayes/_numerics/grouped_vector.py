"""Several tensors seen as one vector in which neighbours along one dimension are consecutive."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.types import Masks


class GroupedVector(RemainingVector):
    """Order of all entries: tensor by tensor, in each along one dimension first.

    Args:
        masks: Tensors of ``True`` by name, of which only the shapes are used.
        dims: The dimension whose neighbours follow each other, by name.

    Example:
        >>> import torch
        >>> vector = GroupedVector({"a": torch.ones(2, 2).bool()}, {"a": 0})
        >>> flat = vector.gather({"a": torch.tensor([[1, 2], [3, 4]])})
        >>> flat.tolist(), vector.scatter(flat)["a"].tolist()
        ([1, 3, 2, 4], [[1, 2], [3, 4]])
    """

    def __init__(self, masks: Masks, dims: Mapping[str, int]) -> None:
        super().__init__(masks)
        self.dims = dims

    @property
    def is_row_major(self) -> bool:
        """Whether the order is that of a :class:`RemainingVector`."""
        return all(self.dims[name] == mask.ndim - 1 for name, mask in self.masks.items())

    def entries(self, name: str, values: Tensor) -> Tensor:
        """Entries of one tensor ``[..., *shape]``, flattened to ``[..., entries]``."""
        first = values.ndim - self.masks[name].ndim
        return values.movedim(first + self.dims[name], -1).flatten(first)

    def _spread(self, name: str, piece: Tensor, fill: float) -> Tensor:
        dim = self.dims[name]
        shape = self.masks[name].movedim(dim, -1).shape
        return piece.reshape(shape).movedim(-1, dim).contiguous()
