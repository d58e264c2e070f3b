"""Ways to take a step, and the search among them by held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods._obs_step import Pruned, State, StepReport


@dataclass(frozen=True)
class Move:
    """One way to take a step; its loss is measured only where there is a choice."""

    pruned: Pruned
    scale: float
    gradient_step: float
    loss: float | None = None
    in_sample: bool | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights after it."""
        return self.pruned.weights(self.scale, self.gradient_step)

    def measured(self) -> Move:
        """The same with its held-out loss, which is measured once."""
        if self.loss is not None:
            return self
        held_out = self.pruned.step.held_out
        if held_out is None:
            raise ArgumentError(
                "Expected numbers for `damping` and `update_scale` with a curvature alone: "
                "choosing them needs `calibration=`."
            )
        at, losses = (self.scale, self.gradient_step), self.pruned.losses
        if at not in losses:
            losses[at] = held_out.held_out_loss(self.weights)
        mean_loss = losses[at]
        return replace(self, loss=mean_loss.value, in_sample=mean_loss.in_sample)

    def after(self, state: State) -> State:
        """The state after the move."""
        pruned = self.pruned
        total = sum(mask.numel() for mask in pruned.masks.values())
        report = StepReport(
            1.0 - int(sum(torch.count_nonzero(mask) for mask in pruned.masks.values())) / total,
            pruned.fisher.block_size,
            pruned.fisher.damping,
            pruned.step.known_unit,
            self.scale,
            self.gradient_step,
            self.loss,
            self.in_sample,
        )
        return State(self.weights, pruned.masks, pruned.scores, (*state.reports, report))


def loss_of(move: Move) -> float:
    """Its held-out loss; one that is not a number loses against any number."""
    loss = move.measured().loss
    return math.inf if loss is None or math.isnan(loss) else loss


def falling(loss_at: Callable[[int], float], start: int, count: int) -> int:
    """The index where a walk from ``start``, up and then down, no longer finds smaller losses.

    Example:
        >>> falling(lambda index: (index - 3) ** 2, 1, 10)
        3
    """
    at = start
    for way in (1, -1):
        while 0 <= at + way < count and loss_at(at + way) < loss_at(at):
            at += way
    return at


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


def best_by_coordinates(
    move_at: Callable[[float, float], Move],
    axes: tuple[Sequence[float], Sequence[float]],
    start: tuple[float, float],
) -> Move:
    """The best move on a grid: along one axis after the other, each as far as the loss falls.

    Near its minimum the loss is close to a parabola along both axes, so this finds what the whole
    grid would for a fraction of its forward passes. A single move is not measured.

    Args:
        move_at: Makes the move at one value of each axis.
        axes: Values in rising order.
        start: Start, a value of each axis.
    """
    if len(axes[0]) == len(axes[1]) == 1:
        return move_at(*start)
    seen: dict[tuple[int, int], Move] = {}

    def loss_at(point: tuple[int, int]) -> float:
        if point not in seen:
            seen[point] = move_at(axes[0][point[0]], axes[1][point[1]]).measured()
        return loss_of(seen[point])

    best = (axes[0].index(start[0]), axes[1].index(start[1]))
    before = None
    while best != before:
        before = best
        for along, way in product((0, 1), (1, -1)):
            while (ahead := _neighbour(best, along, way, axes)) and loss_at(ahead) < loss_at(best):
                best = ahead
    return seen[best]


def _neighbour(
    point: tuple[int, int], along: int, way: int, axes: tuple[Sequence[float], Sequence[float]]
) -> tuple[int, int] | None:
    ahead = point[along] + way
    if not 0 <= ahead < len(axes[along]):
        return None
    return (ahead, point[1]) if along == 0 else (point[0], ahead)
