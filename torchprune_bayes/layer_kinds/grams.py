"""Sums of outer products of a layer's inputs or gradients, batch after batch.

A convolution with ``c`` channels and ``k`` taps multiplies patches of ``c k`` numbers, and their
outer products have ``k²`` blocks ``[c, c]``, one for each pair of taps. The block of the taps ``i``
and ``j`` is ``Σ_u x_u x_{u+d}ᵀ`` over the pixels ``u`` below tap ``i``, where ``d`` is the distance
from ``i`` to ``j``. So pairs of equal distance have almost the same block: they differ by pixels
at the edges, which not all taps come to. :class:`PatchGram` multiplies for every distance once what
all have in common, and once each edge; a 3 x 3 kernel has 13 distances and 45 pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

_ROWS = 512
_MIRROR_ROWS = 256
# Blocks of fewer channels do not keep a processor busy, and edges cost as much as they save.
_LEAST_CHANNELS = 16
_LEAST_GAIN = 1.4

Key = tuple[tuple[int, int], frozenset[int], frozenset[int]]


class Gram:
    """``Σ v vᵀ`` of columns ``v``.

    Args:
        size: Entries of a column.
        like: Has the dtype and the device of the sums.

    Example:
        >>> gram = Gram(2, torch.zeros(()))
        >>> gram.add(torch.tensor([[[[1.0, 2.0], [0.0, 1.0]]]]))
        >>> gram.matrix()
        tensor([[5., 2.],
                [2., 1.]])
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self._total = torch.zeros(size, size, dtype=like.dtype, device=like.device)

    def add(self, columns: Tensor) -> None:
        """Add the products of ``[B, 1, size, T]``."""
        # Blocks of rows up to the diagonal, for half the multiplications.
        flat = columns.to(self._total).movedim(2, 0).flatten(1)
        for start in range(0, len(flat), _ROWS):
            stop = min(start + _ROWS, len(flat))
            self._total[start:stop, :stop].addmm_(flat[start:stop], flat[:stop].mT)

    def matrix(self) -> Tensor:
        """The sum; its memory is handed over, so call this once."""
        return _mirror(self._total)


@dataclass(frozen=True)
class Axis:
    """How a kernel moves along one dimension of padded images.

    Attributes:
        taps: Entries of the kernel.
        stride: Pixels from one place of the kernel to the next.
        dilation: Pixels from one tap to the next.
        zeros: Pixels before and after the image that are known to be zero.
    """

    taps: int
    stride: int = 1
    dilation: int = 1
    zeros: tuple[int, int] = (0, 0)

    def places(self, size: int) -> int:
        """How many places the kernel has in so many pixels."""
        return (size - self.dilation * (self.taps - 1) - 1) // self.stride + 1

    def pixels(self, size: int, distance: int) -> dict[frozenset[int], list[int]]:
        """Pixels by the taps that come to them while others see a pixel so many taps further on.

        Args:
            size: Pixels of the padded image.
            distance: Taps from one to the other, may be negative.

        Example:
            >>> for taps, pixels in Axis(2).pixels(5, 0).items():
            ...     print(sorted(taps), pixels)
            [0] [0]
            [0, 1] [1, 2, 3]
            [1] [4]
        """
        inside = range(self.zeros[0], size - self.zeros[1])
        seen: dict[int, set[int]] = defaultdict(set)
        for tap in range(max(0, -distance), min(self.taps, self.taps - distance)):
            for place in range(self.places(size)):
                pixel = tap * self.dilation + place * self.stride
                if pixel in inside and pixel + distance * self.dilation in inside:
                    seen[pixel].add(tap)
        pixels: dict[frozenset[int], list[int]] = defaultdict(list)
        for pixel in sorted(seen):
            pixels[frozenset(seen[pixel])].append(pixel)
        return pixels


class PatchGram:
    """``Σ v vᵀ`` of the patches ``v`` of images, without cutting them out.

    Args:
        channels: Channels of the images.
        rows: The kernel's way over the rows.
        columns: The kernel's way over the columns.
        like: Has the dtype and the device of the sums.

    Cost: for a 3 x 3 kernel with stride 1 and a margin of zeros 13 of 81 multiplications, of which
    symmetry would save 36, and ``29 c²`` numbers instead of ``81 c²`` until the sum is asked for.

    Example:
        >>> gram = PatchGram(1, Axis(1), Axis(2), torch.zeros(()))
        >>> gram.add(torch.tensor([[[[1.0, 2.0, 3.0]]]]))  # patches (1, 2) and (2, 3)
        >>> gram.matrix()
        tensor([[ 5.,  8.],
                [ 8., 13.]])
    """

    def __init__(self, channels: int, rows: Axis, columns: Axis, like: Tensor) -> None:
        self._channels, self._axes, self._like = channels, (rows, columns), like
        self._parts: dict[Key, Tensor] = {}

    def add(self, images: Tensor) -> None:
        """Add the products of the patches of padded images ``[B, c, rows, columns]``."""
        pixels = images.to(self._like).permute(2, 3, 0, 1).contiguous()
        rows, columns = self._axes
        for down, right in _distances(rows, columns):
            kinds = [rows.pixels(pixels.shape[0], down), columns.pixels(pixels.shape[1], right)]
            for (above, ys), (left, xs) in product(*(kind.items() for kind in kinds)):
                further = [y + down * rows.dilation for y in ys]
                beside = [x + right * columns.dilation for x in xs]
                part = self._part((down, right), above, left)
                part.addmm_(_cut(pixels, ys, xs).mT, _cut(pixels, further, beside))

    def matrix(self) -> Tensor:
        """The sum, ``[c k, c k]``, whose parts are freed on the way; call this once."""
        taps = [axis.taps for axis in self._axes]
        shape = (*taps, self._channels, *taps, self._channels)
        blocks = torch.zeros(shape, dtype=self._like.dtype, device=self._like.device)
        while self._parts:
            (distance, above, left), part = self._parts.popitem()
            if distance == (0, 0):
                part = _mirror(part)
            for i, j in product(above, left):
                m, n = i + distance[0], j + distance[1]
                blocks[i, j, :, m, n] += part
                if distance != (0, 0):
                    blocks[m, n, :, i, j] += part.mT
        return blocks.permute(2, 0, 1, 5, 3, 4).reshape(2 * [self._channels * prod(taps)])

    def _part(self, *key: Any) -> Tensor:
        if key not in self._parts:
            self._parts[key] = self._like.new_zeros(self._channels, self._channels)
        return self._parts[key]


def shares_products(
    channels: int, rows: Axis, columns: Axis, size: Sequence[int], places: int | None = None
) -> bool:
    """Whether :class:`PatchGram` takes clearly fewer multiplications than :class:`Gram`.

    Args:
        channels: Channels of the images.
        rows: The kernel's way over the rows.
        columns: The kernel's way over the columns.
        size: Rows and columns of the padded images.
        places: How many places of the kernel :class:`Gram` would be given; all by default.

    Example:
        >>> shares_products(64, Axis(3), Axis(3), (16, 16))
        True
        >>> shares_products(64, Axis(3, stride=2), Axis(3, stride=2), (16, 16))
        False
    """
    if channels < _LEAST_CHANNELS:
        return False
    axes = rows, columns
    if places is None:
        places = prod(axis.places(n) for axis, n in zip(axes, size, strict=True))
    apart = places * prod(axis.taps**2 for axis in axes)
    shared = 0
    for distance in _distances(rows, columns):
        kinds = (axis.pixels(n, d) for axis, n, d in zip(axes, size, distance, strict=True))
        shared += prod(sum(map(len, kind.values())) for kind in kinds)
    return _LEAST_GAIN * shared < apart / 2


def _distances(rows: Axis, columns: Axis) -> Iterator[tuple[int, int]]:
    """From one tap to another, without those that only go the other way round."""
    for down, right in product(range(rows.taps), range(1 - columns.taps, columns.taps)):
        if (down, right) >= (0, 0):
            yield down, right


def _cut(pixels: Tensor, ys: list[int], xs: list[int]) -> Tensor:
    """``[rows, columns, B, c]`` as ``[chosen, c]``."""
    return pixels[_steps(ys)][:, _steps(xs)].reshape(-1, pixels.shape[-1])


def _steps(numbers: list[int]) -> slice | list[int]:
    """A slice, which copies nothing, if there is one with these numbers."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    even = range(numbers[0], numbers[-1] + 1, step)
    return slice(even.start, even.stop, step) if list(even) == numbers else numbers


def _mirror(total: Tensor) -> Tensor:
    """Copy the lower triangle to the upper one, in place; returns the matrix."""
    for start in range(0, len(total), _MIRROR_ROWS):
        rows = slice(start, start + _MIRROR_ROWS)
        total[:start, rows] = total[rows, :start].mT
        corner = total[rows, rows]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
    return total
