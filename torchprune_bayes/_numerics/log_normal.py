"""Truncated log-normal gates under a log-uniform prior (Neklyudov et al. 2017, arXiv:1705.07283).

A gate θ has the prior ``log θ ~ U[low, high]`` and the posterior
``log θ ~ N(μ, σ²) truncated to [low, high]``. Legend: α = (low − μ)/σ, β = (high − μ)/σ, φ and Φ
the standard normal density and distribution, Z(x, y) = Φ(y) − Φ(x), Z = Z(α, β). Everything is a
difference of logarithms of Z, because the moments divide numbers that underflow both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchprune_bayes._numerics.precision import wide

LOW, HIGH = -20.0, 0.0
"""Bounds of log θ in the papers."""

LOG_SIGMA_LOW, LOG_SIGMA_HIGH = -20.0, 5.0
"""Bounds of log σ within which everything here is finite, gradients included."""

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

_EDGE = 1e-12  # Φ⁻¹ and its derivative are finite from here to one minus this
_NARROW = 1e-4  # below this σ the second difference of log Z is rounding alone


@dataclass(frozen=True)
class TruncatedLogNormal:
    """Posteriors of independent gates, of any shape.

    Args:
        mu: Location of log θ before truncation; any floating dtype, computed with in float64.
        log_sigma: Logarithm of its scale, of the same shape.
        low: Lower bound of log θ.
        high: Upper bound of log θ.

    Cost: a few evaluations of log Φ for each gate, in float64.

    Example:
        >>> mu = torch.tensor([0.0, -8.0])
        >>> q = TruncatedLogNormal(mu, torch.tensor([-5.0, math.log(3.0)]))
        >>> q.kl()
        tensor([7.2699, 0.4976], dtype=torch.float64)
        >>> q.snr() < 1
        tensor([False,  True])
    """

    mu: Tensor
    log_sigma: Tensor
    low: float = LOW
    high: float = HIGH

    def __post_init__(self) -> None:
        object.__setattr__(self, "mu", wide(self.mu))
        object.__setattr__(self, "log_sigma", wide(self.log_sigma))

    @property
    def sigma(self) -> Tensor:
        """Scale of log θ before truncation."""
        return self.log_sigma.exp()

    def standardised(self, log_theta: float) -> Tensor:
        """``(log θ − μ)/σ``."""
        return (log_theta - self.mu) / self.sigma

    def kl(self) -> Tensor:
        """KL(q ‖ p) of each gate: log(high − low) less the entropy of the truncated normal."""
        alpha, beta = self.standardised(self.low), self.standardised(self.high)
        log_z = log_interval(alpha, beta)
        edges = _weighted_density(alpha, log_z) - _weighted_density(beta, log_z)
        width = math.log(self.high - self.low)
        return width - self.log_sigma - log_z - HALF_LOG_2PI - 0.5 - 0.5 * edges

    def log_moment(self, order: int) -> Tensor:
        """Logarithm of E[θᵏ], kμ + ½ k²σ² + log Z(α − kσ, β − kσ) − log Z with k the order."""
        alpha, beta = self.standardised(self.low), self.standardised(self.high)
        shift = order * self.sigma
        moved = log_interval(alpha - shift, beta - shift)
        return order * self.mu + 0.5 * shift.square() + moved - log_interval(alpha, beta)

    def mean(self) -> Tensor:
        """E[θ], which the network uses when it is not trained."""
        return self.log_moment(1).exp()

    def snr(self) -> Tensor:
        """Signal-to-noise ratio E[θ]/√Var[θ]; 1/3 where the posterior is the prior."""
        return self._log_second_moment_ratio().expm1().rsqrt()

    def sample(self, uniform: Tensor) -> Tensor:
        """θ by the inverse distribution function, differentiable in μ and log σ.

        Args:
            uniform: Draws from U(0, 1) in float64, of a shape that broadcasts with μ.
        """
        lower, upper = (torch.special.ndtr(self.standardised(x)) for x in (self.low, self.high))
        quantile = (lower + uniform * (upper - lower)).clamp(_EDGE, 1 - _EDGE)
        log_theta = self.mu + self.sigma * torch.special.ndtri(quantile)
        return log_theta.clamp(self.low, self.high).exp()

    def log_density(self, log_theta: float) -> Tensor:
        """Logarithm of q(log θ), for a point within the bounds."""
        z = self.standardised(log_theta)
        log_z = log_interval(self.standardised(self.low), self.standardised(self.high))
        return -0.5 * z.square() - HALF_LOG_2PI - self.log_sigma - log_z

    def log_probability(self, lower: float, upper: float) -> Tensor:
        """Logarithm of q(lower ≤ log θ ≤ upper), for an interval within the bounds."""
        inside = log_interval(self.standardised(lower), self.standardised(upper))
        return inside - log_interval(self.standardised(self.low), self.standardised(self.high))

    def _log_second_moment_ratio(self) -> Tensor:
        # log E[θ²] − 2 log E[θ]: μ cancels, which leaves σ² and a second difference of log Z. For
        # narrow posteriors that is σ² times its second derivative, the variance being
        # 1 + (αφ(α) − βφ(β))/Z − ((φ(α) − φ(β))/Z)² at the middle of the three points.
        alpha, beta = self.standardised(self.low), self.standardised(self.high)
        sigma = self.sigma
        first, middle, last = (log_interval(alpha - k * sigma, beta - k * sigma) for k in (0, 1, 2))
        exact = sigma.square() + (first - middle) - (middle - last)
        alpha, beta = alpha - sigma, beta - sigma
        drift = (_log_phi(alpha) - middle).exp() - (_log_phi(beta) - middle).exp()
        edges = _weighted_density(alpha, middle) - _weighted_density(beta, middle)
        narrow = sigma.square() * (1 + edges - drift.square())
        return torch.where(sigma < _NARROW, narrow, exact)


def delta_f_normal(
    posterior: TruncatedLogNormal, *, mu_p: float | None = None, sigma_p: float = 0.0
) -> Tensor:
    """Change of the log evidence when the prior of a gate shrinks to a spike (BMRS_N).

    The reduced prior is a truncated log-normal at ``mu_p`` with scale ``sigma_p`` (Wright et al.
    2024, arXiv:2406.01345, equation 8). With ``sigma_p = 0`` this is the Savage-Dickey ratio
    log q(mu_p) − log p(mu_p); otherwise equation 8 with its square completed, so that nothing
    cancels.

    Args:
        posterior: The posteriors.
        mu_p: Where the spike sits; ``None`` for the lower bound, which closes the gate.
        sigma_p: Its scale; the paper has 1e-6.

    Returns:
        Float64, shaped like μ; zero or more where the data prefer the gate closed.
    """
    low, high = posterior.low, posterior.high
    spike = low if mu_p is None else mu_p
    if sigma_p == 0.0:
        return posterior.log_density(spike) + math.log(high - low)
    sigma = posterior.sigma
    joint = torch.hypot(sigma, torch.full_like(sigma, sigma_p))
    # (x − μ̃q)/σ̃q with σ̃q = σ σ̃p / joint, written as a sum without the difference x − μ̃q.
    edges = [
        (x - posterior.mu) * sigma_p / (joint * sigma) + (x - spike) * sigma / (joint * sigma_p)
        for x in (low, high)
    ]
    spike_edges = [torch.full_like(sigma, (x - spike) / sigma_p) for x in (low, high)]
    bounds = [posterior.standardised(x) for x in (low, high)]
    return (
        log_interval(edges[0], edges[1])
        - log_interval(spike_edges[0], spike_edges[1])
        - log_interval(bounds[0], bounds[1])
        + math.log(high - low)
        - HALF_LOG_2PI
        - joint.log()
        - 0.5 * ((posterior.mu - spike) / joint).square()
    )


def delta_f_uniform(
    posterior: TruncatedLogNormal, *, p1: float = 8.0, p2: float | None = None
) -> Tensor:
    """Change of the log evidence when the prior shrinks to gates below ``2^-p1`` (BMRS_U).

    The reduced prior is log-uniform on ``[2^-p2, 2^-p1]``, so the change is
    log q(2^-p2 ≤ θ ≤ 2^-p1) − log p(2^-p2 ≤ θ ≤ 2^-p1) (arXiv:2406.01345, section 4.2).

    Args:
        posterior: The posteriors.
        p1: Bits of precision at which a gate counts as closed.
        p2: Bits below which it does not any more; the paper has 23, which keeps the gates that
            have collapsed the furthest. ``None`` goes down to the lower bound.

    Returns:
        Float64, shaped like μ; zero or more where the data prefer the gate closed.
    """
    low, high = posterior.low, posterior.high
    lower = low if p2 is None else -p2 * math.log(2.0)
    upper = -p1 * math.log(2.0)
    return posterior.log_probability(lower, upper) + math.log((high - low) / (upper - lower))


def log_interval(x: Tensor, y: Tensor) -> Tensor:
    """log(Φ(y) − Φ(x)) for x < y, without underflow in either tail.

    Example:
        >>> x = torch.tensor([-1.0, 40.0], dtype=torch.float64)
        >>> [round(value, 4) for value in log_interval(x, x + 2).tolist()]
        [-0.3817, -804.6084]
    """
    # Both ends in the right tail are mirrored to the left one, where log Φ keeps its digits.
    mirrored = x > 0
    lower, upper = torch.where(mirrored, -y, x), torch.where(mirrored, -x, y)
    log_lower, log_upper = _LogNdtr.apply(lower), _LogNdtr.apply(upper)
    return log_upper + _log1mexp(log_lower - log_upper)


class _LogNdtr(torch.autograd.Function):
    """log Φ with a gradient that holds in the far left tail.

    The gradient φ/Φ is e to the difference of two logarithms, of which torch's own loses all digits
    and then overflows. Below −100 it is −x/(1 − x⁻² + 3x⁻⁴ − 15x⁻⁶), to 1e-14.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value = torch.special.log_ndtr(x)
        ctx.save_for_backward(x, value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, value = ctx.saved_tensors
        ratio = (_log_phi(x) - value).exp()
        inverse = x.clamp(max=-1.0).square().reciprocal()
        tail = -x / (1 - inverse * (1 - inverse * (3 - 15 * inverse)))
        return gradient * torch.where(x < -100.0, tail, ratio)


def _log1mexp(x: Tensor) -> Tensor:
    # log(1 − eˣ) for x < 0, by the form that keeps its digits (Mächler 2012); each branch sees
    # only arguments at which its gradient is finite.
    near = x > -math.log(2.0)
    close = torch.where(near, x, -0.5)
    far = torch.where(near, -1.0, x)
    return torch.where(near, (-close.expm1()).log(), (-far.exp()).log1p())


def _log_phi(x: Tensor) -> Tensor:
    return -0.5 * x.square() - HALF_LOG_2PI


def _weighted_density(x: Tensor, log_z: Tensor) -> Tensor:
    return x * (_log_phi(x) - log_z).exp()
