"""Seeds that are made from one seed, for everything that draws random numbers on its own."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *purpose: int | str) -> int:
    """A seed for one purpose, unrelated to those of other purposes and of other seeds.

    Counting on from a seed (``seed + 1``) makes runs with neighbouring seeds share their draws, and
    with them the spread over seeds comes out too small.

    Args:
        seed: The seed that the user gave.
        purpose: What is drawn: words, and numbers such as that of a step.

    Returns:
        A number in ``[0, 2³²)``, which every generator takes; the same in every process.

    Example:
        >>> derived_seed(0, "labels") == derived_seed(0, "labels")
        True
        >>> len({derived_seed(seed, step) for seed in range(100) for step in range(100)})
        10000
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:4], "big")
