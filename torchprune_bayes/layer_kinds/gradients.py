"""Gradients of single samples by one weight, kept as factors, and the sums of their squares.

Legend: ``B`` samples, ``T`` positions of a sample (pixels, tokens), ``m × k`` the weight. A layer
with inputs ``a`` and gradients ``g`` by its outputs has ``∂ℓ_n/∂W = Σ_t g_nt a_ntᵀ``: these ``B``
matrices need not exist at the same time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchprune_bayes.layer_kinds._pieces import CACHE_BYTES, PATCH_BYTES, budget_of, parts

if TYPE_CHECKING:
    from typing_extensions import Self


class SampleGradients(ABC):
    """The gradients by one weight, one per sample.

    Args:
        samples: ``B``.
        shape: Shape of the weight.
    """

    def __init__(self, samples: int, shape: Sequence[int]) -> None:
        self.samples = samples
        self.shape = torch.Size(shape)

    @abstractmethod
    def add_squares(self, total: Tensor, *, by_position: bool = False) -> None:
        """Add ``Σ_n (∂ℓ_n/∂W)²`` to ``total``, whose dtype is the one that is computed in.

        Args:
            total: Shaped like the weight.
            by_position: Whether the positions of a sample are squared one by one, as if they were
                samples, where they are available.
        """

    @abstractmethod
    def write_to(self, rows: Tensor, *, add: bool) -> None:
        """Write ``∂ℓ_n/∂W`` of all samples to ``rows``, ``[B, *shape]``, or add it.

        Rows may lie apart; each is contiguous.
        """

    @abstractmethod
    def multiplied_out(self, sample: int, rows: slice, like: Tensor) -> Tensor:
        """The given rows, along the first dimension, of the gradient of one sample."""

    def line_sums(self, weight: Tensor, dim: int) -> Tensor:
        """``Σ w ∂ℓ_n/∂w`` over the entries at each place along a dimension, ``[B, places]``.

        Args:
            weight: ``W``, of the dtype that is computed in.
            dim: The dimension.
        """
        rows = weight.new_empty(self.samples, *self.shape)
        self.write_to(rows, add=False)
        others = [other + 1 for other in range(len(self.shape)) if other != dim]
        return (rows * weight).sum(others) if others else rows * weight

    @abstractmethod
    def joined(self, others: Sequence[Self]) -> Self:
        """The gradients that are sums over this use of the weight and others of the same kind."""


class DenseGradients(SampleGradients):
    """Gradients of small weights, multiplied out.

    Args:
        values: ``[B, *shape]``.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape[0], values.shape[1:])
        self.values = values

    def add_squares(self, total: Tensor, *, by_position: bool = False) -> None:
        """Add the sum of the squares of samples; their positions are no longer available."""
        total += self.values.to(total).square().sum(0)

    def write_to(self, rows: Tensor, *, add: bool) -> None:
        """Write or add them."""
        rows.copy_(rows + self.values if add else self.values)

    def multiplied_out(self, sample: int, rows: slice, like: Tensor) -> Tensor:
        """Some rows of the gradient of one sample."""
        return self.values[sample, rows].to(like)

    def joined(self, others: Sequence[DenseGradients]) -> DenseGradients:
        """The gradients that are sums over several uses."""
        return DenseGradients(torch.stack([use.values for use in (self, *others)]).sum(0))


def add_squares(
    uses: Sequence[SampleGradients], total: Tensor, *, by_position: bool = False
) -> None:
    """Add ``Σ_n (Σ_uses ∂ℓ_n/∂W)²``: what a sample's gradient is where a weight is used twice.

    By position, the uses are squared one by one as well.

    Uses of several kinds (a table of embeddings that is also an output layer) are multiplied out, a
    sample and a few rows at a time.

    Example:
        >>> total = torch.zeros(2)
        >>> add_squares([DenseGradients(torch.ones(3, 2)), DenseGradients(torch.ones(3, 2))], total)
        >>> total
        tensor([12., 12.])
    """
    if by_position:
        for use in uses:
            use.add_squares(total, by_position=True)
        return
    kinds = [[use for use in uses if type(use) is kind] for kind in {type(use) for use in uses}]
    joint = [alike[0].joined(alike[1:]) if len(alike) > 1 else alike[0] for alike in kinds]
    if len(joint) == 1:
        joint[0].add_squares(total)
        return
    row_bytes = total[0].numel() * total.element_size()
    for rows in parts(len(total), row_bytes, budget_of(total.device, CACHE_BYTES)):
        for sample in range(joint[0].samples):
            each = [use.multiplied_out(sample, rows, total) for use in joint]
            total[rows] += torch.stack(each).sum(0).square_()


def multiply_out(uses: Sequence[SampleGradients], rows: Tensor) -> None:
    """Write ``Σ_uses ∂ℓ_n/∂W`` of every sample to ``rows``, ``[B, *shape]``.

    Example:
        >>> rows = torch.empty(3, 2)
        >>> multiply_out([DenseGradients(torch.ones(3, 2))] * 2, rows)
        >>> rows.tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    for index, use in enumerate(uses):
        use.write_to(rows, add=index > 0)


def samples_at_once(values: Tensor) -> int:
    """How many of the first dimension are copied at one time.

    Example:
        >>> samples_at_once(torch.zeros(8, 2**20))
        8
    """
    return max(1, budget_of(values.device, PATCH_BYTES) // max(1, values[0].nbytes))


def new_total(weight: Tensor) -> Tensor:
    """Zeros of the shape of a weight, contiguous also where the weight is in channels-last order.

    Example:
        >>> weight = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
        >>> new_total(weight).is_contiguous()
        True
    """
    return torch.zeros_like(weight, memory_format=torch.contiguous_format)
