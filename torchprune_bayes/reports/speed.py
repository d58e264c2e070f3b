"""Speed-up of a shrunk model: both models timed alternately and compared by ratios."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from torchprune_bayes._checks import check_count
from torchprune_bayes.calibration.functional import preserved
from torchprune_bayes.params import unwrap
from torchprune_bayes.wiring.clock import seconds_of
from torchprune_bayes.wiring.forward import ForwardFunction, run


@dataclass(frozen=True)
class Speed:
    """Times of two models that were run alternately.

    Attributes:
        milliseconds_before: Median time of a forward pass of the first model.
        milliseconds_after: That of the second.
        speedup: Median of the ratios before/after of neighbouring passes.
        speedup_low: The smallest of these ratios.
        speedup_high: The largest.
    """

    milliseconds_before: float
    milliseconds_after: float
    speedup: float
    speedup_low: float
    speedup_high: float

    @property
    def conclusive(self) -> bool:
        """Whether all pairs of passes agree on which of the two models is faster."""
        return self.speedup_low > 1.0 or self.speedup_high < 1.0

    def __str__(self) -> str:
        times = f"{self.milliseconds_before:.3g} -> {self.milliseconds_after:.3g} ms"
        ratio = f"{self.speedup:.2f}x, {self.speedup_low:.2f} to {self.speedup_high:.2f}"
        doubt = "" if self.conclusive else ": no measurable difference, time more or larger batches"
        return f"{times} ({ratio}{doubt})"


def compare_speed(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any,
    *,
    pairs: int = 9,
    forward_fn: ForwardFunction | None = None,
) -> Speed:
    """Time forward passes of a model and of its shrunk version.

    Passes of the two models alternate, and the order changes from pair to pair, so that
    other load on the machine affects both: compare ratios, not the times of different runs.
    On a CPU with one thread (``torch.set_num_threads(1)``) waiting for other processes does not
    count, which on a busy machine would mainly slow the longer passes. Both models run once
    before timing, in evaluation mode and without gradients; they are not changed.

    Args:
        before: The whole model, its gates folded.
        after: The shrunk one, on the same device.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
        pairs: Passes of each model.
        forward_fn: ``forward_fn(model, example_inputs) -> output`` for other ways to call them.

    Returns:
        Median times, and the median and range of the ratios.

    Raises:
        ArgumentError: If ``pairs`` is not positive.
        ArgumentTypeError: If the inputs have a different type.

    Cost: ``pairs + 1`` forward passes of each.

    Example:
        >>> wide = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 2))
        >>> narrow = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> speed = compare_speed(wide, narrow, torch.zeros(64, 8))
        >>> speed.speedup_low <= speed.speedup <= speed.speedup_high
        True
    """
    check_count("pairs", pairs)
    models = (unwrap(before), unwrap(after))
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(preserved(model))
        stack.enter_context(torch.no_grad())
        for model in models:
            run(model, example_inputs, forward_fn)
        times = [_pair(models, example_inputs, forward_fn, turn % 2) for turn in range(pairs)]
    ratios = sorted(first / second for first, second in times)
    slow, fast = (1e3 * median(column) for column in zip(*times, strict=True))
    return Speed(slow, fast, median(ratios), ratios[0], ratios[-1])


def _pair(
    models: Sequence[nn.Module],
    inputs: Any,
    forward_fn: ForwardFunction | None,
    first: int,
) -> list[float]:
    """Seconds of one pass of each model; ``first`` runs first."""
    seconds = [0.0, 0.0]
    for index in (first, 1 - first):
        seconds[index] = seconds_of(models[index], partial(run, models[index], inputs, forward_fn))
    return seconds
