"""Choosing a damping in units of the curvature, by held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.types import Decision

RELATIVE_DAMPINGS = tuple(10.0**power for power in range(-4, 4))
"""Candidates in units of the mean curvature; with the largest a method all but ranks by size."""
_START = RELATIVE_DAMPINGS.index(1.0)


@dataclass(frozen=True)
class ChosenDamping:
    """A decision, and the damping that led to it.

    Attributes:
        decision: What is pruned, and how the remaining weights move.
        damping: ``λ``.
        loss: Held-out loss of the decision; ``None`` where it was not measured.
        in_sample: Whether that loss is one of the calibration samples.
        tried: Number of dampings that were tried.
    """

    decision: Decision
    damping: float
    loss: float | None = None
    in_sample: bool | None = None
    tried: int = 1


def best_damping(
    decide_at: Callable[[float], Decision], unit: float, calibration: Calibration | None
) -> ChosenDamping:
    """The damping whose decision has the smallest held-out loss, near its least value.

    Along the candidates the loss mostly has one minimum. The search begins at the unit itself, or
    at the largest candidate if that is better, and goes on to neighbours for as long as the loss
    falls.

    Args:
        decide_at: Makes the decision at a damping ``λ``.
        unit: Mean curvature of the weights, positive.
        calibration: Where losses are measured; without it the unit is taken.

    Raises:
        CalibrationError: If no decision has a finite loss.

    Cost: a decision and a held-out loss for each candidate that is tried, mostly four to six.
    """
    if calibration is None:
        return ChosenDamping(decide_at(unit), unit)
    losses: dict[int, float] = {}
    best = ChosenDamping(Decision({}), unit, math.inf)

    def loss_at(index: int) -> float:
        nonlocal best
        if index not in losses:
            damping = RELATIVE_DAMPINGS[index] * unit
            decision = decide_at(damping)
            measured = calibration.held_out_loss(_weights_after(decision, calibration))
            loss = measured.value if math.isfinite(measured.value) else math.inf
            if loss < min(losses.values(), default=math.inf):
                best = ChosenDamping(decision, damping, loss, measured.in_sample)
            losses[index] = loss
        return losses[index]

    at = min((_START, len(RELATIVE_DAMPINGS) - 1), key=loss_at)
    for way in (1, -1):
        while 0 <= at + way < len(RELATIVE_DAMPINGS) and loss_at(at + way) < loss_at(at):
            at += way
    if math.isinf(losses[at]):
        raise CalibrationError(
            "Expected a finite held-out loss after pruning with one damping at least, got none: "
            "check the loss and the data, or give `damping` a number."
        )
    return replace(best, tried=len(losses))


def _weights_after(decision: Decision, calibration: Calibration) -> dict[str, Tensor]:
    if decision.updates is not None:
        return decision.updates
    values = calibration.space.values()
    return {name: values[name] * mask for name, mask in decision.masks.items()}
