"""The local search of CBS (arXiv 2203.04466) as the paper describes it, pair by pair.

Slow on purpose: a Python loop over pairs, each scored from the gradients' columns. With
``a_k = w_k g_k`` the objective is ``Q(P) = ‖Σ_{k∈P} a_k‖²/N``, without damping.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def literal_search(
    gradients: Tensor,
    weights: Tensor,
    keep: Tensor,
    *,
    epsilon: float = 1e-4,
    swap_range: int = 10,
    max_no_match: int = 20,
    max_iterations: int = 100,
) -> Iterator[Tensor]:
    """Yield the mask after every outer iteration.

    Args:
        gradients: ``[N, D]``.
        weights: ``[D]``.
        keep: Boolean ``[D]``, the start.
        epsilon: Smallest fall of ``Q`` for a swap.
        swap_range: How far the ranks of a pair may lie apart.
        max_no_match: Failures after which an iteration ends.
        max_iterations: Outer iterations.
    """
    columns = gradients * weights
    count = len(gradients)
    keep = keep.clone()
    own = columns.square().sum(0)
    for _ in range(max_iterations):
        residual = columns[:, ~keep].sum(1)
        along = 2.0 * (residual @ columns)
        restored = _sorted(along - own, ~keep, largest=True)
        first = columns[:, restored[:1]]
        pruned = _sorted(along + own - 2.0 * (first.T @ columns).flatten(), keep, largest=False)
        swaps = _one_pass(
            columns, residual, restored, pruned, epsilon * count, swap_range, max_no_match
        )
        if not swaps:
            return
        for i, j in swaps:
            keep[i], keep[j] = True, False
        yield keep.clone()


def _one_pass(
    columns: Tensor,
    residual: Tensor,
    restored: Tensor,
    pruned: Tensor,
    threshold: float,
    swap_range: int,
    max_no_match: int,
) -> list[tuple[int, int]]:
    swaps: list[tuple[int, int]] = []
    used: set[int] = set()
    failures = 0
    for rank, i in enumerate(restored.tolist()):
        low, high = max(rank - swap_range, 0), min(rank + swap_range, len(pruned))
        candidates = range(low, high) if rank else range(min(1, len(pruned)))
        for place in candidates:
            j = int(pruned[place])
            if place in used:
                continue
            moved = residual + sum(
                (columns[:, b] - columns[:, a] for a, b in swaps), torch.zeros_like(residual)
            )
            step = columns[:, j] - columns[:, i]
            if -float(2.0 * moved @ step + step @ step) >= threshold:
                swaps.append((i, j))
                used.add(place)
                break
        else:
            if not rank:
                return []
            failures += 1
            if failures > max_no_match:
                break
    return swaps


def _sorted(values: Tensor, chosen: Tensor, *, largest: bool) -> Tensor:
    indices = chosen.nonzero().squeeze(1)
    return indices[values[indices].argsort(descending=largest)]
