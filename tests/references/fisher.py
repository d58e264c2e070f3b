"""Slow float64 twins of the empirical Fisher's kernels, one line of the papers at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_fisher(gradients: Tensor, damping: float) -> Tensor:
    """``λI + (1/N) Σ g gᵀ`` of gradients ``[N, B]``, formed."""
    count, size = gradients.shape
    return damping * torch.eye(size, dtype=torch.float64) + gradients.T @ gradients / count


def inverse_by_recursion(gradients: Tensor, damping: float) -> Tensor:
    """Inverse by the rank-one recursion of WoodFisher (arXiv 2004.14340, equation 11)."""
    count, size = gradients.shape
    inverse = torch.eye(size, dtype=gradients.dtype) / damping
    for gradient in gradients:
        moved = inverse @ gradient
        inverse = inverse - torch.outer(moved, moved) / (count + gradient @ moved)
    return inverse


def joint_update(
    gradients: Tensor, damping: float, weights: Tensor, keep: Tensor, step: float
) -> Tensor:
    """Minimise ``η ḡᵀδ + ½ δᵀFδ`` subject to ``δ_P = −w_P`` through its KKT system."""
    fisher = damped_fisher(gradients, damping)
    pruned = (~keep).nonzero().squeeze(1)
    size, constraints = len(weights), len(pruned)
    selector = torch.zeros(constraints, size, dtype=torch.float64)
    selector[torch.arange(constraints), pruned] = 1.0
    system = torch.zeros(size + constraints, size + constraints, dtype=torch.float64)
    system[:size, :size] = fisher
    system[size:, :size] = selector
    system[:size, size:] = selector.T
    right = torch.cat([-step * gradients.mean(0), -weights[pruned]])
    return torch.linalg.solve(system, right)[:size]


def single_update(
    gradients: Tensor, damping: float, weights: Tensor, keep: Tensor, step: float
) -> Tensor:
    """Sum over ``q`` in ``P`` of ``−(w_q − ηu_q)/F⁻¹_qq · F⁻¹e_q``, and ``−ηu``; ``−w`` on P."""
    inverse = torch.linalg.inv(damped_fisher(gradients, damping))
    descent = step * inverse @ gradients.mean(0)
    update = -descent
    for q in (~keep).nonzero().squeeze(1):
        update = update - (weights[q] - descent[q]) / inverse[q, q] * inverse[:, q]
    return torch.where(keep, update, -weights)
