"""Estimated cost of shrinking, before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch

from torchprune_bayes.calibration import Batch, Calibration, batch_size
from torchprune_bayes.calibration.batches import cut
from torchprune_bayes.structured.curves import points_on

_TIMED = 8
"""Samples of the timed evaluation."""

_GRADIENT, _MOMENTS, _HELD_OUT = 3, 3, 2
"""Forward passes that a gradient takes, and those for moments and held-out losses of a repair."""


@dataclass(frozen=True)
class ShrinkEstimate:
    """Cost of shrinking with a calibration, in passes over the data.

    Attributes:
        samples: Calibration samples.
        gradients: How many of them give a gradient.
        tried: Samples of each evaluation of the loss.
        evaluations: Largest number of evaluations of the loss, for the curves.
        forward_samples: Largest number of samples run through the model, a gradient counted as
            three.
        seconds: Estimated time of these, extrapolated from one forward pass; without the time for
            solving.
    """

    samples: int
    gradients: int
    tried: int
    evaluations: int
    forward_samples: int
    seconds: float


def estimate_shrinking(
    calibration: Calibration, evaluations: int, *, scored_by_gradients: bool = True
) -> ShrinkEstimate:
    """Estimate the cost of ``shrink(model, inputs, calibration)`` by timing a forward pass.

    Args:
        calibration: Model and data; not changed.
        evaluations: Points of all loss curves; 0 if none are measured.
        scored_by_gradients: Whether the importance takes a gradient of each sample.

    Cost: two forward passes over eight samples; a count of the data if ``num_samples`` was not
    given.

    Example:
        >>> from torchprune_bayes import Calibration
        >>> data = [(torch.randn(100, 64), torch.randint(2, (100,)))]
        >>> loss = torch.nn.functional.cross_entropy
        >>> plan = estimate_shrinking(Calibration(torch.nn.Linear(64, 2), data, loss), 9)
        >>> plan.samples, plan.tried, plan.evaluations
        (100, 100, 9)
    """
    samples = calibration.num_samples
    fitted, tried = (min(samples, size) for size in points_on(evaluations))
    gradients = samples if scored_by_gradients else 0
    forward = _GRADIENT * gradients + tried * evaluations + _MOMENTS * fitted + _HELD_OUT * samples
    seconds = forward * _seconds_per_sample(calibration)
    return ShrinkEstimate(samples, gradients, tried, evaluations, forward, seconds)


def _seconds_per_sample(calibration: Calibration) -> float:
    batch: Batch = cut(next(iter(calibration.batches())), 0, _TIMED)
    with torch.no_grad():
        calibration.loss(None, batch)  # warms up kernels
        begin = perf_counter()
        calibration.loss(None, batch)
    return (perf_counter() - begin) / batch_size(batch)
