"""Gradients of single samples that are sums of outer products: of linear layers, convolutions.

Legend: ``B`` samples, ``T`` positions of a sample (pixels, tokens), ``G`` groups of ``m × k``
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.layer_kinds._pieces import CACHE_BYTES, PATCH_BYTES, budget_of, parts
from torchprune_bayes.layer_kinds.gradients import SampleGradients
from torchprune_bayes.layer_kinds.grams import Gram, PatchGram


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
        entries = self.right_entries + self.left[0].numel()
        for chunk in self._chunks(entries * total.element_size()):
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
        for chunk in self._chunks(self.right_entries * rows.element_size()):
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
        for chunk in self._chunks(entries * weight.element_size()):
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
        for chunk in self._chunks(self.right_entries * self.left.element_size()):
            gram.add(self.right(chunk))

    def _chunks(self, bytes_each: int) -> Iterator[slice]:
        return parts(self.samples, bytes_each, budget_of(self.left.device, PATCH_BYTES))


def _add_squared_products(left: Tensor, right: Tensor, blocks: Tensor) -> None:
    """Add ``Σ_n (left_n @ right_n)²``, ``[b, G, m, T]`` by ``[b, G, T, k]``, to ``[G, m, k]``."""
    budget = budget_of(left.device, CACHE_BYTES)
    row_bytes = blocks[:, 0].numel() * blocks.element_size()
    for rows in parts(blocks.shape[1], row_bytes, budget):
        total, part = blocks[:, rows], left[:, :, rows]
        for chunk in parts(len(left), total.numel() * total.element_size(), budget):
            product = part[chunk] @ right[chunk]
            if len(product) == 1:
                total.addcmul_(product[0], product[0])
            else:
                total += product.square_().sum(0)
