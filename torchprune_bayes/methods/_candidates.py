"""Ways to take one pruning step, and the choice among them by held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.types import Masks, Scores

_LONGEST_WALK = 8


@dataclass(frozen=True)
class Step:
    """Where a step starts: the weights, what is live, and the Fisher of gradients taken there."""

    index: int
    calibration: Calibration | None
    fisher: EmpiricalFisher
    weights: dict[str, Tensor]
    masks: Masks


@dataclass(frozen=True)
class Stage:
    """A part of a step that ends with a choice of masks."""

    step: Step
    damping: float
    index: int
    """Counted over all stages of all steps."""
    masks: Masks
    """What is live before it."""


@dataclass(frozen=True)
class Candidate:
    """One way to take a step; its loss is measured only where there is a choice."""

    masks: Masks
    weights: dict[str, Tensor]
    scores: Scores
    block_size: int | str
    damping: float
    scale: float
    gradient_step: float
    loss: float | None = None
    in_sample: bool | None = None

    def report(self) -> dict[str, Any]:
        """The plain numbers of the step."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        total = sum(mask.numel() for mask in self.masks.values())
        numbers = ("block_size", "damping", "scale", "gradient_step", "loss", "in_sample")
        return {"sparsity": 1.0 - kept / total} | {name: getattr(self, name) for name in numbers}


def walked(
    candidates_at: Callable[[float], Iterator[Candidate]],
    damping: float,
    factor: float,
    calibration: Calibration,
) -> Candidate:
    """The best candidate on a walk from ``damping`` by ``factor``, ended by the first rise."""
    best = _measured(best_of(candidates_at(damping), calibration), calibration)
    for power in range(1, _LONGEST_WALK + 1):
        found = best_of(candidates_at(damping * factor**power), calibration)
        found = _measured(found, calibration)
        if _loss(found) >= _loss(best):
            break
        best = found
    return best


def best_of(candidates: Iterator[Candidate], calibration: Calibration | None) -> Candidate:
    """The candidate of smallest held-out loss; a single one is not measured.

    Raises:
        ArgumentError: If there is a choice and no data to choose by.
    """
    best = next(candidates)
    for candidate in candidates:
        if calibration is None:
            raise ArgumentError(
                "Expected numbers for `damping` and `update_scale` with a curvature alone: "
                "choosing them needs `calibration=`."
            )
        best = min(_measured(best, calibration), _measured(candidate, calibration), key=_loss)
    return best


def _measured(candidate: Candidate, calibration: Calibration) -> Candidate:
    if candidate.loss is not None:
        return candidate
    found = calibration.held_out_loss(candidate.weights)
    return replace(candidate, loss=found.value, in_sample=found.in_sample)


def _loss(candidate: Candidate) -> float:
    # A loss that is not a number loses against any number.
    loss = candidate.loss
    return math.inf if loss is None or math.isnan(loss) else loss
