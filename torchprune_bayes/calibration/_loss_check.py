"""Whether the loss of a batch is the mean of the losses of its samples."""

from __future__ import annotations

import math
from warnings import warn

import torch

from torchprune_bayes.calibration._held_out import LossesOf
from torchprune_bayes.calibration.batches import Batch, batch_size, cut, joined
from torchprune_bayes.errors import CalibrationWarning

CHECKED_SAMPLES = 8
_DISTINCT = 1e-3  # relative difference of two losses that tells weights from rounding
_UNEQUAL = 2.0  # times one sample counts as much as another

_NO_MEAN = (
    "The loss of a batch is not the mean of the losses of its samples, as with class weights, with "
    "a mean over unlike numbers of labels, or where samples are compared with one another. "
    "Gradients of single samples do not know of it: raise `mini_batch`, or divide a summed loss by "
    "the number of samples (reduction='sum', then / len(target))."
)
_SUMMED = (
    "The loss of a batch is the sum of the losses of its samples: pass a loss_fn with mean "
    "reduction."
)


def warn_unless_mean(losses_of: LossesOf, pieces: list[Batch]) -> None:
    """Warn if single samples have gradients that do not average to the gradient of a batch.

    The loss of a pair lies between those of its two samples, ``(a l₁ + b l₂)/(a + b)``, where
    samples have weights, and gives their ratio; where it lies elsewhere, the samples are
    compared with each other. A ratio below two gives no warning.

    Args:
        losses_of: The mean losses of batches, scalars on the device.
        pieces: Samples to pair.

    Cost: two forward passes over up to eight samples.
    """
    batch = joined(pieces) or max(pieces, key=batch_size)
    count = min(batch_size(batch), CHECKED_SAMPLES)
    each = [cut(batch, index, index + 1) for index in (*range(count), 0)]
    *singles, again = torch.stack(losses_of(each)).tolist()
    if again != singles[0]:
        return  # a model that draws random numbers has no loss to compare
    order = sorted((i for i in range(count) if math.isfinite(singles[i])), key=lambda i: singles[i])
    pairs = [(i, j) for i, j in zip(order[: count // 2], reversed(order), strict=False) if i != j]
    if not pairs:
        return
    joint = [joined([cut(batch, i, i + 1), cut(batch, j, j + 1)]) for i, j in pairs]
    losses = torch.stack(losses_of(joint)).tolist()
    kinds = {
        _kind(both, singles[i], singles[j]) for both, (i, j) in zip(losses, pairs, strict=True)
    }
    if "no mean" in kinds or "sum" in kinds:
        message = _NO_MEAN if "no mean" in kinds else _SUMMED
        warn(message, CalibrationWarning, stacklevel=2)


def _kind(both: float, low: float, high: float) -> str:
    """How the loss of two samples relates to their own: ``"mean"``, ``"sum"`` or ``"no mean"``."""
    scale = _DISTINCT * max(abs(low), abs(high), abs(both))
    if not math.isfinite(both) or abs(both - (low + high) / 2) <= scale:
        return "mean"
    if abs(both - (low + high)) <= scale:
        return "sum"
    share = (both - low) / (high - low) if high > low else math.inf  # of the weight of the second
    return "mean" if 1 / (1 + _UNEQUAL) < share < _UNEQUAL / (1 + _UNEQUAL) else "no mean"
