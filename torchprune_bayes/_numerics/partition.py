"""How the remaining vector is cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor


def partition(
    sizes: Sequence[int], block_size: int | str, *, across_tensors: bool = False
) -> list[tuple[int, int]]:
    """Cut consecutive tensors of ``sizes`` remaining entries into contiguous blocks.

    Args:
        sizes: Remaining entries per tensor.
        block_size: ``"tensor"`` (one block per tensor), ``"full"`` (one block in all), or the
            largest number of entries in a block; the last block of a tensor may be shorter.
        across_tensors: Whether blocks of a given size may span several tensors.

    Returns:
        ``[(start, stop), ...]`` in the remaining vector; empty blocks are left out.

    Example:
        >>> partition([5, 2], 2)
        [(0, 2), (2, 4), (4, 5), (5, 7)]
        >>> partition([5, 2], "tensor"), partition([5, 2], "full")
        ([(0, 5), (5, 7)], [(0, 7)])
    """
    if block_size == "full" or across_tensors:
        sizes = [sum(sizes)]
    blocks = []
    for stop, size in zip(accumulate(sizes), sizes, strict=True):
        length = block_size if isinstance(block_size, int) else max(size, 1)
        start = stop - size
        blocks += [(low, min(low + length, stop)) for low in range(start, stop, length)]
    return blocks


def blocks_of_kept(runs: Sequence[tuple[int, int, int]], keep: Tensor) -> list[tuple[int, int]]:
    """The blocks of the entries that are kept, without those of which nothing is.

    Args:
        runs: Start, number and size of consecutive blocks of one size, over the whole vector.
        keep: Boolean ``[D]``.

    Example:
        >>> keep = torch.tensor([True, False, True, True, False])
        >>> blocks_of_kept([(0, 2, 2), (4, 1, 1)], keep)
        [(0, 1), (1, 3)]
    """
    parts = [keep[start : start + number * size].view(-1, size) for start, number, size in runs]
    counts = torch.cat([torch.count_nonzero(part, dim=1) for part in parts])
    stops: list[int] = counts[counts > 0].cumsum(0).tolist()
    return list(pairwise([0, *stops]))


def runs_of_equal_size(
    blocks: Sequence[tuple[int, int]],
) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start, number of blocks, block size)`` of consecutive blocks of one size.

    Example:
        >>> list(runs_of_equal_size([(0, 2), (2, 4), (4, 5)]))
        [(0, 2, 2), (4, 1, 1)]
    """
    for size, run in groupby(blocks, key=lambda block: block[1] - block[0]):
        members = list(run)
        yield members[0][0], len(members), size
