"""Ways to take one pruning step, and the choice among them by held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.types import Masks, Scores


@dataclass(frozen=True)
class Step:
    """Where a step starts: the weights, what is live, and the Fisher of gradients taken there."""

    index: int
    calibration: Calibration | None
    fisher: EmpiricalFisher
    weights: dict[str, Tensor]
    masks: Masks

    @cached_property
    def damping_unit(self) -> float:
        """Mean squared gradient; kept, because a streamed Fisher takes a pass for it."""
        return self.fisher.mean_square() or 1.0


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


def walk_from(start: float, factor: float, bounds: tuple[float, float]) -> list[float]:
    """Dampings from ``start`` on, each ``factor`` times the one before, as far as the bounds.

    Example:
        >>> walk_from(2.0, 3.0, (1.0, 20.0))
        [2.0, 6.0, 18.0]
    """
    lowest, highest = bounds
    walk = [min(max(start, lowest), highest)]
    while lowest <= walk[-1] * factor <= highest:
        walk.append(walk[-1] * factor)
    return walk


def walked(
    candidates_at: Callable[[float], Iterator[Candidate]],
    dampings: list[float],
    calibration: Calibration,
) -> Candidate:
    """The best candidate on a walk along ``dampings``, ended by the first rise of the loss."""
    best: Candidate | None = None
    for damping in dampings:
        found = _measured(best_of(candidates_at(damping), calibration), calibration)
        if best is not None and _loss(found) >= _loss(best):
            break
        best = found
    assert best is not None  # there is a damping at least
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
