"""Optimal brain damage: what to prune by the diagonal of a curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.methods._target import Target
from torchprune_bayes.types import Decision, Scores


def obd_decision(
    target: Target, weights: Mapping[str, Tensor], diagonal: Mapping[str, Tensor], **info: Any
) -> Decision:
    """Prune the smallest ``½ w_i² |H_ii|``; kept weights do not move.

    Args:
        target: How many, among which.
        weights: Values by qualified name.
        diagonal: ``H_ii`` of the loss by qualified name.
        info: What it took.

    Raises:
        CalibrationError: If the diagonal is zero, which tells no weight from another.
    """
    scores = obd_scores(weights, diagonal)
    return Decision(target.keep(0, scores, target.initial), scores=scores, info=info)


def obd_scores(weights: Mapping[str, Tensor], diagonal: Mapping[str, Tensor]) -> Scores:
    """``½ w_i² |H_ii|``, float64.

    Raises:
        CalibrationError: If the diagonal is zero, which tells no weight from another.
    """
    if not any(value.any() for value in diagonal.values()):
        raise CalibrationError(
            "Expected a curvature that tells weights apart, got zeros alone: the loss does not "
            "depend on the weights, is linear in them, or no label counts."
        )
    return {
        name: weight.double().square() * diagonal[name].abs().to(weight.device) / 2
        for name, weight in weights.items()
    }
