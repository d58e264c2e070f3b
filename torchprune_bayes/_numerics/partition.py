"""How the remaining vector is cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby


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
