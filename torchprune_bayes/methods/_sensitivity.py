"""Sensitivity of the loss to gates on the weights, which several methods rank by.

A gate ``c`` multiplies a weight, ``c ⊙ w``. By the chain rule the loss changes by ``w ∂L/∂w`` per
unit of the gate at ``c = 1``, so that no gates are needed. Everything here is a function of given
weights; the model keeps its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchprune_bayes.calibration import Calibration, batch_size
from torchprune_bayes.curvature._leaves import leaves_of
from torchprune_bayes.types import Masks, Scores


def masked(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """The weights with zeros where the mask is ``False``."""
    return {name: weight.masked_fill(~masks[name], 0) for name, weight in weights.items()}


def sensitivities(
    calibration: Calibration, weights: Mapping[str, Tensor], at: Mapping[str, Tensor] | None = None
) -> Scores:
    """``w ∂L/∂w`` of the mean loss over all calibration samples, with its sign.

    Args:
        calibration: Data, model and loss.
        weights: The factor ``w``, by qualified name.
        at: Where the gradient is taken, by default at ``weights``.
    """
    gradient = calibration.mean_gradient(weights if at is None else at)
    return {name: weight * gradient[name].to(weight.device) for name, weight in weights.items()}


def mean_loss(calibration: Calibration, weights: Mapping[str, Tensor]) -> float:
    """Mean loss over all calibration samples."""
    values, total = leaves_of(calibration, weights), 0.0
    with torch.no_grad():
        for batch in calibration.batches():
            total += float(calibration.loss(values, batch)) * batch_size(batch)
    return total / calibration.num_samples


def absolute(scores: Scores, unit: float = 1.0) -> Scores:
    """Absolute values, in units of ``unit``."""
    return {name: score.abs() / unit for name, score in scores.items()}
