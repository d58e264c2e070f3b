"""Log marginal likelihood of a Laplace approximation, and its slope by the log prior precisions.

Legend as in :mod:`~torchprune_bayes._numerics.laplace_blocks`, with ``L`` the sum of the negative
log-likelihoods, ``T`` the temperature and ``σ`` the observation noise, ``s = 1/(Tσ²)``::

    log Z = −s L − N C log(σ√2π) − ½ Σ [log det(sH + D) − log det D + θᵀDθ]

The middle term is there for regression alone. ``log Z`` is concave in ``log δ`` for every form of
``H`` and for every product of factors, the lower bound with Kronecker factors included: a
determinant of ``sH + D`` with positive semi-definite ``H`` is a polynomial in the ``δ`` whose
coefficients are not negative, and the log of such is convex in ``log δ``. So every stationary point
is a maximum over all ``δ`` at these weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from torchprune_bayes._numerics.laplace_blocks import LaplaceBlock, Precision


@dataclass(frozen=True)
class EvidenceTerm:
    """One tensor's part of the evidence.

    Args:
        block: Curvature ``H``, summed over the data.
        weights: ``θ`` less the prior mean, ``[rows, columns]``, of any floating-point type.
    """

    block: LaplaceBlock
    weights: Tensor

    def squares(self) -> Tensor:
        """``θ²``, float64: made when needed, as there may be many terms."""
        return self.weights.double().square()

    def occam(self, precision: Precision, scale: float) -> Tensor:
        """``−½ [log det(sH + D) − log det D + θᵀDθ]``, a scalar."""
        scatter = (precision.dense() * self.squares()).sum()
        return -0.5 * (self.block.log_det_ratio(precision, scale) + scatter)

    def parts_of_slope(self, precision: Precision, scale: float) -> tuple[Tensor, Tensor]:
        """``γ`` and ``δθ²``; half their difference is the slope of :meth:`occam` by ``log δ``."""
        effective = self.block.effective_parameters(precision, scale)
        return effective, precision.dense() * self.squares()


def log_marginal_likelihood(
    log_likelihood: float,
    terms: Iterable[tuple[EvidenceTerm, Precision]],
    scale: float,
) -> float:
    """``log Z``, from a log-likelihood that has ``s`` and the noise's normaliser in it already.

    Example:
        >>> import torch
        >>> from torchprune_bayes._numerics.laplace_blocks import DiagonalBlock
        >>> term = EvidenceTerm(DiagonalBlock(torch.tensor([[3.0]])), torch.zeros(1, 1).double())
        >>> one = Precision((torch.ones(1, 1).double(),), (1, 1))
        >>> log_marginal_likelihood(0.0, [(term, one)], scale=1.0)  # −½ log(4)
        -0.693...
    """
    return log_likelihood + sum(float(term.occam(precision, scale)) for term, precision in terms)


def gaussian_log_likelihood(
    squared_error: float, observations: int, noise: float, temperature: float = 1.0
) -> float:
    """``−SSE/(2Tσ²) − n log(σ√2π)`` of ``n`` observed numbers with Gaussian noise ``σ``."""
    fit = squared_error / (2.0 * temperature * noise**2)
    return -fit - observations * math.log(noise * math.sqrt(2.0 * math.pi))


def fixed_point_noise(
    squared_error: float, observations: int, effective: float, temperature: float = 1.0
) -> float:
    """MacKay's ``σ``, where ``∂ log Z/∂ log σ`` is zero for a fixed ``γ``.

    ``σ² = SSE / (T (n − Σγ))``; the sum of ``γ`` is capped at 99 % of ``n``.

    Example:
        >>> fixed_point_noise(squared_error=8.0, observations=4, effective=2.0)
        2.0
    """
    free = observations - min(effective, 0.99 * observations)
    return math.sqrt(squared_error / (temperature * free))
