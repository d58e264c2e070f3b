"""Ways to take one pruning step, and the choice among them by held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
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
    last: Mapping[str, Any]
    """The report of the step before; empty for the first one."""

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
    candidate_at: Callable[[float], Candidate], dampings: list[float], calibration: Calibration
) -> Candidate:
    """The best candidate on a walk along ``dampings``, ended by the first rise of the loss."""
    best: Candidate | None = None
    for damping in dampings:
        found = _measured(candidate_at(damping), calibration)
        if best is not None and _loss(found) >= _loss(best):
            break
        best = found
    assert best is not None  # there is a damping at least
    return best


def climbed(
    candidate_at: Callable[[float, float], Candidate],
    axes: tuple[Sequence[float], Sequence[float]],
    start: tuple[float, float],
    calibration: Calibration | None,
) -> Candidate:
    """The best candidate on a grid: along one axis after the other, each as far as the loss falls.

    Near its minimum the loss is close to a parabola along both axes, so this finds what the whole
    grid would for a fraction of its forward passes. Far from it there may be other minima, so the
    climb begins at the smallest move if that is better than ``start``. A single candidate is not
    measured.

    Args:
        candidate_at: Makes the candidate at one value of each axis.
        axes: Values in rising order.
        start: Where to begin, a value of each axis.
        calibration: Where losses are measured.
    """
    seen: dict[tuple[int, int], Candidate] = {}

    def loss_at(point: tuple[int, int]) -> float:
        if point not in seen:
            found = _measured(candidate_at(axes[0][point[0]], axes[1][point[1]]), calibration)
            seen[point] = replace(found, weights={})  # of all but the best they are not needed
        return _loss(seen[point])

    if len(axes[0]) == len(axes[1]) == 1:
        return candidate_at(*start)
    best = min((axes[0].index(start[0]), axes[1].index(start[1])), (0, 0), key=loss_at)
    before = None
    while best != before:
        before = best
        for along, way in product((0, 1), (1, -1)):
            while (ahead := _neighbour(best, along, way, axes)) and loss_at(ahead) < loss_at(best):
                best = ahead
    weights = candidate_at(axes[0][best[0]], axes[1][best[1]]).weights
    return replace(seen[best], weights=weights)


def best_of(candidates: Iterator[Candidate], calibration: Calibration | None) -> Candidate:
    """The candidate of smallest held-out loss; a single one is not measured."""
    best = next(candidates)
    for candidate in candidates:
        best = min(_measured(best, calibration), _measured(candidate, calibration), key=_loss)
    return best


def _neighbour(
    point: tuple[int, int], along: int, way: int, axes: tuple[Sequence[float], Sequence[float]]
) -> tuple[int, int] | None:
    ahead = point[along] + way
    if not 0 <= ahead < len(axes[along]):
        return None
    return (ahead, point[1]) if along == 0 else (point[0], ahead)


def _measured(candidate: Candidate, calibration: Calibration | None) -> Candidate:
    if candidate.loss is not None:
        return candidate
    if calibration is None:
        raise ArgumentError(
            "Expected numbers for `damping` and `update_scale` with a curvature alone: "
            "choosing them needs `calibration=`."
        )
    found = calibration.held_out_loss(candidate.weights)
    return replace(candidate, loss=found.value, in_sample=found.in_sample)


def _loss(candidate: Candidate) -> float:
    # A loss that is not a number loses against any number.
    loss = candidate.loss
    return math.inf if loss is None or math.isnan(loss) else loss
