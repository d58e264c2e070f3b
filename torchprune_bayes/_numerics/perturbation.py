"""Randomly perturbed rankings that keep exactly as many entries as asked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MOST_CHUNKS = 1000


def apportion(total: int, sizes: Tensor) -> Tensor:
    """Share ``total`` among parties in proportion to ``sizes`` by largest remainders.

    Args:
        total: At most the sum of ``sizes``.
        sizes: Integers ``[n]``, not all zero.

    Returns:
        Integers ``[n]`` that sum to ``total``, each at most its size and within one of its share.

    Example:
        >>> apportion(5, torch.tensor([4, 4, 2]))
        tensor([2, 2, 1])
    """
    whole = sizes.sum()
    shares = total * sizes // whole
    remainders = total * sizes % whole
    ranks = remainders.argsort(descending=True, stable=True).argsort()
    return shares + (ranks < total - shares.sum())


def perturbed_keep(scores: Tensor, kept: int, generator: torch.Generator) -> Tensor:
    """Keep the largest scores of each of ``√D`` random chunks of the entries.

    The random magnitude perturbation of CBS (arXiv 2203.04466), which rounds the number of every
    chunk up; here the chunks share ``kept`` exactly.

    Args:
        scores: ``[D]``.
        kept: How many entries to keep.
        generator: On the CPU.

    Returns:
        Boolean ``[D]`` with exactly ``kept`` entries ``True``.

    Cost: sorts of the chunks, ``O(D log D)`` in time and ``O(D)`` in memory.

    Example:
        >>> scores = torch.arange(100.0)
        >>> int(perturbed_keep(scores, 17, torch.Generator().manual_seed(0)).sum())
        17
    """
    entries = len(scores)
    chunks = max(1, min(math.isqrt(entries), _MOST_CHUNKS))
    size = math.ceil(entries / chunks)
    order = torch.randperm(entries, generator=generator).to(scores.device)
    padded = scores.new_full((math.ceil(entries / size) * size,), -torch.inf)
    padded[:entries] = scores[order]
    rows = padded.unflatten(0, (-1, size))
    sizes = torch.full((len(rows),), size)
    sizes[-1] -= len(padded) - entries
    quotas = apportion(kept, sizes).to(scores.device)
    ranks = rows.argsort(descending=True, stable=True).argsort()
    chosen = (ranks < quotas.unsqueeze(-1)).flatten()[:entries]
    return torch.zeros_like(chosen).scatter(0, order, chosen)


def perturbed_in_groups(scores: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    """As :func:`perturbed_keep` in every group, for patterns that fix how many each group keeps.

    A group of ``M`` is shuffled and cut into ``√M`` chunks; the best of each chunk come first, the
    others after them by their scores.

    Args:
        scores: ``[groups, M]``; negative where an entry cannot be kept.
        kept: Integers ``[groups]``, of at most as many entries as have other scores.
        generator: On the CPU.

    Returns:
        Boolean ``[groups, M]`` with ``kept`` entries ``True`` in each group.

    Example:
        >>> kept = perturbed_in_groups(
        ...     torch.rand(5, 4), torch.full((5,), 2), torch.Generator().manual_seed(0)
        ... )
        >>> kept.sum(-1).tolist()
        [2, 2, 2, 2, 2]
    """
    size = scores.shape[-1]
    chunks = max(1, math.isqrt(size))
    order = torch.rand(scores.shape, generator=generator).argsort(-1).to(scores.device)
    shuffled = scores.double().gather(-1, order)
    rank = torch.zeros_like(order)
    for chunk in torch.arange(size).chunk(chunks):
        places = shuffled[:, chunk].argsort(descending=True, stable=True).argsort()
        rank[:, chunk] = places
    # By place within the chunk, then by score; what cannot be kept comes last.
    by_score = shuffled.argsort(descending=True, stable=True).argsort()
    key = rank * size + by_score + (shuffled < 0) * size * size
    chosen = key.argsort(-1).argsort(-1) < kept.unsqueeze(-1)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)
