"""Products with a damped empirical Fisher and its inverse, block by block.

Legend: ``D`` remaining entries, ``N`` gradients, ``B`` entries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchprune_bayes._numerics.fisher_blocks import (
    InverseFisher,
    in_sample_space,
    invert,
    small_blocks_diagonal,
)
from torchprune_bayes._numerics.gradient_tiles import (
    Gradients,
    mean,
    mean_squares,
    times,
    transposed_times,
)
from torchprune_bayes._numerics.leave_one_out import kept_block, leave_one_out
from torchprune_bayes._numerics.obs import Directions, joint_directions, single_directions
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.curvature.blocked_gradients import BlockedGradients

SAMPLED_BLOCKS = 16
"""Blocks that represent all of them where the damping is chosen."""
_FEWEST_SAMPLES = 64


class DampedFisher(BlockedGradients):
    """``F = λI + (1/N) Σ_n g_n g_nᵀ`` of stored gradients.

    Attributes:
        damping: ``λ``.
        known_diagonal: That of ``F⁻¹``, if already computed.
    """

    damping: float
    known_diagonal: Tensor | None = None

    def inverses(self) -> Iterator[tuple[slice, InverseFisher]]:
        """Yield batches of inverted blocks with their range of the vector."""
        for where, gradients in self.sweep():
            yield where, self._inverse(where, gradients)

    def _inverse(self, where: slice, gradients: Gradients) -> InverseFisher:
        space = self.space_of(where, gradients)
        if space is None:
            return invert(gradients, self.damping)
        return space.inverse(gradients, self.damping)

    def directions(
        self,
        weights: Tensor,
        keep: Tensor,
        *,
        single: bool = False,
        descent: bool = True,
        continues: bool = False,
    ) -> Directions:
        """Update of the kept weights when the others are set to zero, ``[D]``.

        In float64; in float32 with many blocks if the damping is so large that its rounding is
        harmless (:func:`~torchprune_bayes._numerics.gradient_tiles.damped_gram`).

        Args:
            weights: ``[D]``.
            keep: Boolean ``[D]``.
            single: Whether the updates for removing each weight alone are added up, as the
                WoodFisher paper does, instead of solving for all together.
            descent: Whether to compute the first-order part; otherwise it is zero.
            continues: Whether scores of what is kept will be asked for next: of small blocks the
                factors of a joint update give them too.
        """
        compensation, newton, diagonal = (_Vector(self.remaining.numel) for _ in range(3))
        kept = self.most_kept(keep)
        continues = continues and not single and self.in_small_blocks
        for where, gradients in self.sweep():
            shape = gradients.shape[::2]
            w, k = weights[where].unflatten(0, shape), keep[where].unflatten(0, shape)
            if single:
                space = self.products.spaces.get(where.start)
                update = single_directions(invert(gradients, self.damping, space), w, k)
            else:
                most = kept[where.start]
                inner = self.kept_inner(gradients, k, most)
                change = None
                if gradients.shape[0] > 1 and most <= self.count:
                    change = self.products.change(where, gradients, weights)
                update = joint_directions(
                    gradients,
                    self.damping,
                    w,
                    k,
                    kept=most,
                    inner=inner,
                    change=change,
                    descent=descent,
                    diagonal=continues,
                )
            compensation.put(where, update.compensation)
            if descent:
                newton.put(where, update.newton)
            if update.diagonal is not None:
                diagonal.put(where, update.diagonal)
        if diagonal.is_written:
            self.products.diagonal = keep.clone(), self.damping, diagonal.values
        moved = compensation.values
        return Directions(moved, newton.values if descent else moved.new_zeros(()).expand_as(moved))

    def held_out_errors(self, weights: Tensor, keep: Tensor, dampings: Sequence[float]) -> Tensor:
        """Quality of the joint update on gradients that it did not use, for several dampings.

        By leaving out one gradient at a time, see :mod:`torchprune_bayes._numerics.leave_one_out`.
        Up to 16 blocks, evenly spread, represent all of them, with as many gradients as make
        the cost that of one Gram matrix at most.

        Args:
            weights: ``[D]``.
            keep: Boolean ``[D]``.
            dampings: ``λ``, ``k`` of them.

        Returns:
            Rise of the quadratic model of the loss, at the best share of the update, ``[k]``.
        """
        chosen = self.blocks[:: -(-len(self.blocks) // SAMPLED_BLOCKS)]
        entries = sum(stop - start for start, stop in chosen)
        room = self.count**2 * entries / (9 * len(chosen))
        count = min(self.count, max(int(room ** (1 / 3)), _FEWEST_SAMPLES))
        parts, most = [], int(torch.count_nonzero(keep))  # of a single block, all it keeps
        for start, stop in chosen:
            gradients, k = self.block(start, stop), keep[None, start:stop]
            inner = self.kept_inner(gradients, k, most)
            parts.append(kept_block(gradients, weights[None, start:stop], k, count, inner))
        ridges = self.count * torch.tensor(dampings, dtype=torch.float64)
        return leave_one_out(parts, ridges.to(parts[0].values.device))

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of ``F⁻¹``, float64 ``[D]``; within one per cent with many blocks.

        Cost: ``N²D`` (``N < B``) or ``(N + B) B D``; nothing where the update of the stage before
        gave it.
        """
        if self.known_diagonal is not None:
            return self.known_diagonal.clone()
        vector = _Vector(self.remaining.numel)
        for where, gradients in self.sweep():
            if isinstance(gradients, Tensor) and len(gradients) > 1 and in_sample_space(gradients):
                vector.put(where, small_blocks_diagonal(gradients, self.damping))
            else:
                vector.put(where, self._inverse(where, gradients).inverse_diagonal())
        return vector.values

    def solve(self, vector: Tensor) -> Tensor:
        """``F⁻¹ v`` for ``v`` of shape ``[D]``, float64."""
        return torch.cat(
            [
                inverse.solve(vector[where].unflatten(0, inverse.shape)).flatten()
                for where, inverse in self.inverses()
            ]
        )

    def columns(self, indices: Tensor) -> Tensor:
        """Columns ``F⁻¹[:, i]`` for indices ``[k]`` into the vector, float64 ``[D, k]``."""
        units = torch.zeros(self.remaining.numel, len(indices), dtype=torch.float64)
        units = wide(units.to(indices.device)).scatter_(0, indices.unsqueeze(0), 1.0)
        parts = [
            inverse.solve(units[where].unflatten(0, inverse.shape)).flatten(0, 1)
            for where, inverse in self.inverses()
        ]
        return torch.cat(parts)

    def multiply(self, vector: Tensor) -> Tensor:
        """``F v`` for ``v`` of shape ``[D]``, float64."""
        parts = []
        for where, gradients in self.sweep():
            part = wide(vector[where]).unflatten(0, gradients.shape[::2]).unsqueeze(-1)
            product = transposed_times(gradients, times(gradients, part))
            parts.append(product.flatten() / self.count)
        return torch.cat(parts) + self.damping * wide(vector)

    def quadratic(self, vector: Tensor) -> float:
        """``½ vᵀ F v`` without the damping, the predicted rise of the loss for a step ``v``."""
        sums = []
        for where, gradients in self.sweep():
            part = wide(vector[where]).unflatten(0, gradients.shape[::2]).unsqueeze(-1)
            sums.append(times(gradients, part).square().sum())
        return float(torch.stack(sums).sum()) / (2 * self.count)

    def mean_gradient(self) -> Tensor:
        """``(1/N) Σ_n g_n``, float64 ``[D]``."""
        return torch.cat([mean(gradients).flatten() for _, gradients in self.sweep()])

    def mean_square(self) -> float:
        """Mean over the entries of ``(1/N) Σ g²``, the natural unit of the damping."""
        sums = []
        for where, gradients in self.sweep():
            space = self.products.spaces.get(where.start)
            if space is None:
                sums.append(mean_squares(gradients).sum() * self.count)
            else:
                sums.append(space.inner.diagonal(dim1=-2, dim2=-1).sum())  # the trace of GGᵀ
        return float(torch.stack(sums).sum()) / (self.count * self.remaining.numel)


class _Vector:
    """A vector ``[D]`` that is written block by block where it will lie.

    Parts that are collected would keep the memory between them from being used again.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self.values = torch.empty(0)

    @property
    def is_written(self) -> bool:
        """Whether any part was."""
        return self.values.numel() > 0

    def put(self, where: slice, part: Tensor) -> None:
        """Write the entries of some blocks, in the wider of both dtypes."""
        if part.numel() == self._entries:
            self.values = part.flatten()
            return
        if not self.is_written:
            self.values = part.new_empty(self._entries)
        elif self.values.dtype != part.dtype:
            self.values = self.values.to(torch.promote_types(self.values.dtype, part.dtype))
        self.values[where] = part.flatten()
