"""Evidence for removing weights with Gaussian posteriors, by the Savage-Dickey ratio."""

from __future__ import annotations

from torch import Tensor


def delta_f_gaussian(mean: Tensor, variance: Tensor, prior_precision: Tensor) -> Tensor:
    """Change of the log evidence when the prior of a weight shrinks to a spike at zero.

    With the posterior ``N(m, s²)`` of a weight and its prior ``N(0, 1/δ)`` this is
    log q(0) − log p(0) = −½ log(s² δ) − m²/(2 s²): an Occam term for what the data say about
    the weight, less what they say against zero (Friston and Penny 2011, doi:10.1016/j.neuroimage.
    2011.03.062; for networks as in arXiv:2406.01345, equation 6). Over independent weights it adds
    up.

    Args:
        mean: Posterior means, of any shape.
        variance: Marginal posterior variances, shaped like them.
        prior_precision: δ, of a shape that broadcasts with them.

    Returns:
        Float64, shaped like ``mean``; zero or more where the data favour removal. Weights that
        a posterior holds fixed, with zero variance, have −∞.

    Cost: elementwise.

    Example:
        >>> import torch
        >>> mean, variance = torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.25])
        >>> delta_f_gaussian(mean, variance, torch.tensor(1.0))  # log 2, and 2 less than that
        tensor([ 0.6931, -1.3069], dtype=torch.float64)
    """
    mean, variance = mean.double(), variance.double()
    fixed = variance <= 0
    safe = variance.masked_fill(fixed, 1.0)
    change = -0.5 * (safe * prior_precision.double()).log() - 0.5 * mean.square() / safe
    return change.masked_fill(fixed, float("-inf"))
