"""How well an update does on a sample that took no part in it, in closed form.

Legend: ``G_K`` gradients of the kept entries of a block ``[n, |K|]``, ``G_K G_Kᵀ = UΛUᵀ`` with
``r`` eigenvalues that are not zero, ``y = G_P w_P`` what the pruned weights did to every sample,
``κ = Nλ``.

The joint update ``δ_K = G_Kᵀ(G_K G_Kᵀ + κI)⁻¹y`` is ridge regression of ``y`` on the gradients of
the kept weights, and ``½ mean (y − G_Kδ_K)²`` is the rise of the quadratic model of the loss. On
the samples it was fitted to, the smallest damping always looks best. Leaving out one sample at a
time and predicting it from the others has a closed form (the PRESS statistic of ridge regression),

    y_n − ŷ_n = [(G_K G_Kᵀ + κI)⁻¹y]_n / [(G_K G_Kᵀ + κI)⁻¹]_nn,

which one eigendecomposition gives for every damping.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from torchprune_bayes._numerics.gradient_tiles import Gradients, gram
from torchprune_bayes._numerics.obs import removed_change
from torchprune_bayes._numerics.precision import wide


class KeptBlock(NamedTuple):
    """A block of the Fisher as far as predictions of left-out samples need it, float64."""

    values: Tensor
    """``Λ``, ``[r]``; tiny where an eigenvalue is zero."""
    vectors: Tensor
    """``U``, ``[n, r]``; zero where an eigenvalue is zero."""
    change: Tensor
    """``y``, ``[n]``."""


def kept_block(
    gradients: Gradients,
    weights: Tensor,
    keep: Tensor,
    count: int,
    inner: Tensor | None = None,
) -> KeptBlock:
    """Spectrum and targets of one block, in the smaller of the two forms of the spectrum.

    Args:
        gradients: ``[1, N, B]``.
        weights: ``[1, B]``.
        keep: Boolean ``[1, B]``.
        count: ``n``: the first so many gradients stand for all.
        inner: ``G_K G_Kᵀ``, ``[1, N, N]``, if already computed.

    Cost: ``NB min(N, B) + 9r³`` operations, ``r = min(n, B)``.
    """
    change = removed_change(gradients, weights, keep)[0, :count]
    if isinstance(gradients, Tensor) and gradients.shape[-1] < count:
        kept = wide(gradients[0, :count] * keep[0])
        values, right = _spectrum(kept.mT @ kept)
        return KeptBlock(values, (kept @ right) / values.sqrt(), change)
    inner = gram(gradients, keep) if inner is None else inner
    values, vectors = _spectrum(inner[0, :count, :count])
    return KeptBlock(values, vectors, change)


def leave_one_out(blocks: Iterable[KeptBlock], ridges: Tensor) -> Tensor:
    """Predicted rises of the loss on samples that were left out of the update.

    The prediction for a sample is the sum of those of all blocks.

    Args:
        blocks: One block at least.
        ridges: ``κ > 0``, float64 ``[k]``.

    Returns:
        ``½ mean (y − sŷ)²`` at the best share ``s`` in [0, 1] of the update, ``[k]``.

    Cost: ``2knr`` operations per block.

    Example:
        >>> eye, one = torch.eye(2).double(), torch.ones(2).double()
        >>> unlike = KeptBlock(one, eye, one)  # samples without anything in common
        >>> leave_one_out([unlike], torch.tensor([0.5]).double())
        tensor([0.5000], dtype=torch.float64)
    """
    blocks = list(blocks)
    total = torch.stack([block.change for block in blocks]).sum(0).unsqueeze(-1)  # [n, 1]
    errors = torch.stack([_left_out_errors(block, ridges) for block in blocks]).sum(0)  # [n, k]
    predicted = total - errors
    power = predicted.square().sum(0)
    scale = (total * predicted).sum(0) / power.clamp_min(torch.finfo(power.dtype).tiny)
    scale = scale.clamp(0.0, 1.0)
    return 0.5 * (total - scale * predicted).square().mean(0)


def _left_out_errors(block: KeptBlock, ridges: Tensor) -> Tensor:
    values, vectors, change = block.values.unsqueeze(-1), block.vectors, block.change.unsqueeze(-1)
    shares = values / (values + ridges)  # [r, k]
    solved = change - vectors @ (shares * (vectors.mT @ change))  # κ (G_K G_Kᵀ + κI)⁻¹y
    # 1 − Σ u²Λ/(Λ+κ) = (1 − Σ u²) + Σ u²κ/(Λ+κ), without the cancellation.
    squares = vectors.square()
    outside = (1.0 - squares.sum(-1, keepdim=True)).clamp_min(0.0)
    diagonal = outside + squares @ (ridges / (values + ridges))
    return solved / diagonal.clamp_min(torch.finfo(diagonal.dtype).eps)


def _spectrum(inner: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(inner)
    finfo = torch.finfo(values.dtype)
    real = values > values[-1] * (len(values) * finfo.eps)
    return values.where(real, torch.full_like(values, finfo.tiny)), vectors * real
