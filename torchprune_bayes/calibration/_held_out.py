"""Held-out samples for choices, and the handling of those without a finite loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias
from warnings import warn

import torch
from torch import Tensor

from torchprune_bayes.calibration.batches import Batch, batch_size, cut, samples_in
from torchprune_bayes.errors import CalibrationError, CalibrationWarning

LossesOf: TypeAlias = Callable[[Iterable[Batch]], list[Tensor]]
"""The mean losses of batches, scalars on the device."""

LossesAt: TypeAlias = Callable[[Mapping[str, Tensor] | None], LossesOf]
"""The losses at given weights, where ``None`` stands for the model's own."""


@dataclass(frozen=True)
class MeanLoss:
    """A mean loss, its number of samples, and whether gradients were taken from these.

    ``value`` is infinite where the loss at these weights is not finite, and never NaN.
    """

    value: float
    samples: int
    in_sample: bool


class HeldOutSamples:
    """Batches to measure losses on.

    A sample without a finite loss at the model's own weights would make every loss NaN, so that
    nothing could be chosen: it is dropped, with a warning. Where the loss is finite at the model's
    own weights and not at others, the other weights are at fault.

    Args:
        batches: Returns the batches, the same at every call.
        in_sample: Whether these are the calibration samples themselves.
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]], *, in_sample: bool) -> None:
        self._batches = batches
        self._in_sample = in_sample
        self._sifted = False

    def mean_loss(self, losses_at: LossesAt, weights: Mapping[str, Tensor] | None) -> MeanLoss:
        """Mean loss at ``weights``.

        Raises:
            CalibrationError: If no sample has a finite loss at the model's own weights.
        """
        value, samples = self._mean(losses_at(weights))
        if not math.isfinite(value) and not self._sifted:
            self._sift(losses_at(None))
            value, samples = self._mean(losses_at(weights))
        return MeanLoss(value if math.isfinite(value) else math.inf, samples, self._in_sample)

    def _mean(self, losses_of: LossesOf) -> tuple[float, int]:
        counts: list[int] = []
        losses = losses_of(_counted(self._batches(), counts))
        values: list[float] = torch.stack(losses).tolist()  # fetched from the device together
        total = sum(loss * count for loss, count in zip(values, counts, strict=True))
        return total / sum(counts), sum(counts)

    def _sift(self, losses_of: LossesOf) -> None:
        kept: list[Batch] = []
        samples = 0
        for batch in self._batches():
            samples += batch_size(batch)
            kept += _finite_parts(batch, losses_of)
        left = samples_in(kept)
        where = "calibration" if self._in_sample else "held-out"
        if not kept:
            raise CalibrationError(
                f"Expected finite losses at the model's own weights, got none on {samples} {where} "
                "samples: check the data, the labels and the loss."
            )
        self._sifted = True
        if left < samples:
            self._batches = lambda: kept
            warn(
                f"Left {samples - left} of {samples} {where} samples out of the choices, whose "
                "loss at the model's own weights is not finite: check these inputs and labels, or "
                "take them out of the data.",
                CalibrationWarning,
                stacklevel=2,
            )


def _counted(batches: Iterable[Batch], counts: list[int]) -> Iterator[Batch]:
    """The batches, noting how many samples each has."""
    for batch in batches:
        counts.append(batch_size(batch))
        yield batch


def _finite_parts(batch: Batch, losses_of: LossesOf) -> Iterator[Batch]:
    """The largest parts of a batch, by halving it, whose loss is finite."""
    if math.isfinite(float(losses_of([batch])[0])):
        yield batch
        return
    half = batch_size(batch) // 2
    if half:
        yield from _finite_parts(cut(batch, 0, half), losses_of)
        yield from _finite_parts(cut(batch, half, batch_size(batch)), losses_of)
