"""The batches of a fit, and samples of them that identify the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from torch import Tensor

from torchprune_bayes.calibration import (
    Batch,
    Calibration,
    batch_size,
    cut,
    grouped,
    joined,
    sizes,
)
from torchprune_bayes.calibration.normalisation import differing_samples
from torchprune_bayes.curvature.layers.normalisation import MOST_EXAMPLES
from torchprune_bayes.errors import CalibrationError


def whole_mini_batches(
    calibration: Calibration, weights: Mapping[str, Tensor] | None, size: int, mini_batch: int
) -> Iterator[Batch]:
    """Yield batches of about ``size`` samples, of whole mini-batches.

    Raises:
        CalibrationError: If mini-batches would have samples of several shapes.
    """
    size = max(size // mini_batch, 1) * mini_batch
    batches = calibration.fisher_batches(weights, size)
    if mini_batch == 1:
        yield from batches
        return
    for pieces in grouped(batches, sizes(calibration.num_samples, size)):
        batch = joined(pieces)
        parts = pieces if batch is None else [batch]
        if any(batch_size(part) % mini_batch for part in parts):
            raise CalibrationError(
                f"Expected mini-batches of {mini_batch} samples of equal shapes, got one of "
                f"several: give batches of a multiple of {mini_batch} samples, or take "
                "mini_batch=1."
            )
        yield from parts


def first_of(batches: Iterator[Batch], mini_batch: int) -> list[Batch]:
    """The first batch, or more if it holds one sample, which proves nothing."""
    head = [next(batches)]
    if batch_size(head[0]) < 2 * mini_batch:
        head += islice(batches, MOST_EXAMPLES - 1)
    return head


def examples_of(batch: Batch, ignore_index: int, most: int, mini_batch: int) -> Batch:
    """Samples, or mini-batches, that differ and have labels that are not ignored."""
    if mini_batch > 1:
        return cut(batch, 0, most * mini_batch)
    return differing_samples(batch, ignore_index, most)
