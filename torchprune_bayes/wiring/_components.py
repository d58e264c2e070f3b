"""Connected components of a graph whose edges are listed as pairs of vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def components(pairs: Sequence[tuple[Tensor, Tensor]], nodes: int) -> Tensor:
    """Return for each node the smallest node that it is connected with.

    Args:
        pairs: Edges between the first and the second of each pair of int64 vectors.
        nodes: Number of nodes.

    Returns:
        Int64 ``[nodes]``.

    Cost: a few passes over the edges; their number grows with the logarithm of the longest path.

    Example:
        >>> components([(torch.tensor([4, 1]), torch.tensor([1, 2]))], 6)
        tensor([0, 1, 1, 3, 1, 5])
    """
    root = torch.arange(nodes)
    if not pairs:
        return root
    one = torch.cat([pair[0] for pair in pairs])
    other = torch.cat([pair[1] for pair in pairs])
    while True:
        low, high = torch.minimum(root[one], root[other]), torch.maximum(root[one], root[other])
        apart = low < high
        if not bool(apart.any()):
            return root
        one, other = one[apart], other[apart]
        root = root.scatter_reduce(0, high[apart], low[apart], "amin")
        while not torch.equal(shorter := root[root], root):
            root = shorter
