"""Gradients of single samples by one weight, kept as factors, and the sums of their squares.

Legend: ``B`` samples, ``T`` positions of a sample (pixels, tokens), ``m × k`` the weight. A layer
with inputs ``a`` and gradients ``g`` by its outputs has ``∂ℓ_n/∂W = Σ_t g_nt a_ntᵀ``: these ``B``
matrices need not exist at the same time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.layer_kinds.grams import Gram, PatchGram

if TYPE_CHECKING:
    from typing_extensions import Self

# What is multiplied out at one time, so that on a CPU it is squared where it was made, in a cache.
_CACHE_BYTES = {"cpu": 2**21, "cuda": 2**28}
# Patches of images that are cut out at one time.
_PATCH_BYTES = {"cpu": 2**25, "cuda": 2**28}


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


class OuterProducts(SampleGradients):
    """``Σ_t l_nt r_ntᵀ``, in ``G`` groups of ``m`` rows each.

    Args:
        left: ``[B, G, m, T]``.
        right: Returns ``[b, G, k, T]`` of a slice of the samples; patches of images are much larger
            than the images, so they are cut out for a few samples at a time.
        right_entries: ``G k T``.
        shape: Shape of the weight, ``G m k`` entries.
        inputs_left: Whether the layer's inputs are the left factors, and not the right ones.
    """

    def __init__(
        self,
        left: Tensor,
        right: Callable[[slice], Tensor],
        right_entries: int,
        shape: Sequence[int],
        *,
        inputs_left: bool = False,
    ) -> None:
        super().__init__(left.shape[0], shape)
        self.left = left
        self.right = right
        self.right_entries = right_entries
        self.inputs_left = inputs_left

    @property
    def positions(self) -> int:
        """``T``."""
        return self.left.shape[-1]

    @property
    def factor_sizes(self) -> tuple[int, int]:
        """Entries of a position's ``g`` and of its ``a``."""
        sizes = self.left.shape[2], self.shape.numel() // self.left.shape[2]
        return (sizes[1], sizes[0]) if self.inputs_left else sizes

    def add_squares(self, total: Tensor, *, by_position: bool = False) -> None:
        """Add the sum of the squares."""
        blocks = total.view(*self.left.shape[1:3], -1)
        budget = _budget(self.left, _PATCH_BYTES)
        entries = self.right_entries + self.left[0].numel()
        for chunk in _parts(self.samples, entries * total.element_size(), budget):
            left, right = self.left[chunk].to(total), self.right(chunk).to(total).mT
            if self.positions == 1 or by_position:
                # (l rᵀ)² = l² (r²)ᵀ entry by entry, so that the sum over all is a product
                left, right = left.square(), right.square()
                blocks += left.movedim(0, -2).flatten(-2) @ right.movedim(0, -3).flatten(-3, -2)
            else:
                _add_squared_products(left, right, blocks)

    def write_to(self, rows: Tensor, *, add: bool) -> None:
        """Write or add the products, patches of a few samples at a time."""
        groups, height = self.left.shape[1:3]
        blocks = rows.view(self.samples, groups, height, -1)
        budget = _budget(self.left, _PATCH_BYTES)
        for chunk in _parts(self.samples, self.right_entries * rows.element_size(), budget):
            left, right = self.left[chunk].to(rows), self.right(chunk).to(rows).mT
            if groups == 1:
                blocks[chunk, 0].baddbmm_(left[:, 0], right[:, 0], beta=int(add))
            else:
                product = left @ right
                blocks[chunk] = blocks[chunk] + product if add else product

    def line_sums(self, weight: Tensor, dim: int) -> Tensor:
        """``Σ_t r_nt · (Wᵀ l_nt)``, or the other way round; no gradient is multiplied out."""
        if dim > 1:
            return super().line_sums(weight, dim)
        matrix = weight.reshape(*self.left.shape[1:3], -1)
        result = weight.new_empty(self.samples, self.shape[dim])
        entries = 2 * self.right_entries + self.left[0].numel()
        budget = _budget(self.left, _PATCH_BYTES)
        for chunk in _parts(self.samples, entries * weight.element_size(), budget):
            left, right = self.left[chunk].to(weight), self.right(chunk).to(weight)
            if dim == 0:
                moved = torch.einsum("gmk,bgkt->bgmt", matrix, right)
                result[chunk] = (moved * left).sum(-1).flatten(1)
            else:
                moved = torch.einsum("gmk,bgmt->bgkt", matrix, left)
                each = (moved * right).sum(-1).sum(1)
                result[chunk] = each.unflatten(1, (self.shape[1], -1)).sum(-1)
        return result

    def new_input_gram(self, like: Tensor) -> Gram | PatchGram:
        """A sum of outer products of inputs, of ``like``'s dtype, for :meth:`add_input_gram`."""
        return Gram(self.factor_sizes[1], like)

    def add_output_gram(self, gram: Gram) -> None:
        """Add ``Σ_n Σ_t g gᵀ``, for a layer without groups."""
        self._add_gram(gram, left=not self.inputs_left)

    def add_input_gram(self, gram: Gram | PatchGram) -> None:
        """Add ``Σ_n Σ_t a aᵀ``, likewise."""
        self._add_gram(gram, left=self.inputs_left)

    def multiplied_out(self, sample: int, rows: slice, like: Tensor) -> Tensor:
        """Some rows of the gradient of one sample."""
        if self.left.shape[1] > 1:
            raise ArgumentError("Expected one group in a weight that is tied to others, got more.")
        one = slice(sample, sample + 1)
        left = self.left[sample, 0, rows].to(like)
        return (left @ self.right(one)[0, 0].to(like).mT).unflatten(1, self.shape[1:])

    def joined(self, others: Sequence[OuterProducts]) -> OuterProducts:
        """The gradients that are sums over several uses."""
        uses = (self, *others)

        def right(chunk: slice) -> Tensor:
            return torch.cat([use.right(chunk) for use in uses], dim=-1)

        left = torch.cat([use.left for use in uses], dim=-1)
        entries = sum(use.right_entries for use in uses)
        return OuterProducts(left, right, entries, self.shape, inputs_left=self.inputs_left)

    def _add_gram(self, gram: Gram | PatchGram, *, left: bool) -> None:
        if left:
            gram.add(self.left)
            return
        bytes_each = self.right_entries * self.left.element_size()
        for chunk in _parts(self.samples, bytes_each, _budget(self.left, _PATCH_BYTES)):
            gram.add(self.right(chunk))


class EmbeddingRows(SampleGradients):
    """Gradients of a table: ``Σ_t e(i_nt) g_ntᵀ``, zero in all rows that a sample does not look up.

    Args:
        indices: ``i``, ``[B, T]``; negative ones are left out.
        gradients: ``g``, ``[B, T, k]``.
        shape: Shape of the table.
    """

    def __init__(self, indices: Tensor, gradients: Tensor, shape: Sequence[int]) -> None:
        super().__init__(indices.shape[0], shape)
        self.indices = indices
        self.gradients = gradients

    def add_squares(self, total: Tensor, *, by_position: bool = False) -> None:
        """Add the sum of the squares."""
        seen = self.indices >= 0
        if by_position:
            total.index_add_(0, self.indices[seen], self.gradients[seen].to(total).square_())
            return
        sample = torch.arange(self.samples, device=seen.device).unsqueeze(1)
        keys = (sample * self.shape[0] + self.indices)[seen]
        unique, places = keys.unique(return_inverse=True)
        sums = total.new_zeros(len(unique), self.shape[1])
        sums.index_add_(0, places, self.gradients[seen].to(total))
        total.index_add_(0, unique % self.shape[0], sums.square_())

    def write_to(self, rows: Tensor, *, add: bool) -> None:
        """Write or add them."""
        if not add:
            rows.zero_()
        for sample, row in enumerate(rows):
            seen = self.indices[sample] >= 0
            row.index_add_(0, self.indices[sample, seen], self.gradients[sample, seen].to(rows))

    def multiplied_out(self, sample: int, rows: slice, like: Tensor) -> Tensor:
        """Some rows of the gradient of one sample."""
        start, stop, _ = rows.indices(self.shape[0])
        indices = self.indices[sample]
        seen = (indices >= start) & (indices < stop)
        table = torch.zeros(stop - start, self.shape[1], dtype=like.dtype, device=like.device)
        return table.index_add_(0, indices[seen] - start, self.gradients[sample, seen].to(like))

    def joined(self, others: Sequence[EmbeddingRows]) -> EmbeddingRows:
        """The gradients that are sums over several uses."""
        uses = (self, *others)
        indices = torch.cat([use.indices for use in uses], dim=1)
        gradients = torch.cat([use.gradients for use in uses], dim=1)
        return EmbeddingRows(indices, gradients, self.shape)


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
    for rows in _parts(len(total), row_bytes, _budget(total, _CACHE_BYTES)):
        for sample in range(joint[0].samples):
            parts = [use.multiplied_out(sample, rows, total) for use in joint]
            total[rows] += torch.stack(parts).sum(0).square_()


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
    return max(1, _budget(values, _PATCH_BYTES) // max(1, values[0].nbytes))


def new_total(weight: Tensor) -> Tensor:
    """Zeros of the shape of a weight, contiguous also where the weight is in channels-last order.

    Example:
        >>> weight = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
        >>> new_total(weight).is_contiguous()
        True
    """
    return torch.zeros_like(weight, memory_format=torch.contiguous_format)


def _add_squared_products(left: Tensor, right: Tensor, blocks: Tensor) -> None:
    """Add ``Σ_n (left_n @ right_n)²``, ``[b, G, m, T]`` by ``[b, G, T, k]``, to ``[G, m, k]``."""
    budget, row_bytes = _budget(left, _CACHE_BYTES), blocks[:, 0].numel() * blocks.element_size()
    for rows in _parts(blocks.shape[1], row_bytes, budget):
        total, part = blocks[:, rows], left[:, :, rows]
        for chunk in _parts(len(left), total.numel() * total.element_size(), budget):
            product = part[chunk] @ right[chunk]
            if len(product) == 1:
                total.addcmul_(product[0], product[0])
            else:
                total += product.square_().sum(0)


def _parts(length: int, bytes_each: int, budget: int) -> Iterator[slice]:
    step = max(1, budget // max(1, bytes_each))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _budget(tensor: Tensor, budgets: dict[str, int]) -> int:
    return budgets.get(tensor.device.type, budgets["cuda"])
