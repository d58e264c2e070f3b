"""One pass over the samples of a calibration, as rows of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.calibration._room import GradientRoom
from torchprune_bayes.calibration._rows import GradientRows
from torchprune_bayes.calibration._samples import CalibrationSamples
from torchprune_bayes.calibration.batches import samples_in
from torchprune_bayes.calibration.fisher_targets import FisherTargets
from torchprune_bayes.calibration.functional import FunctionalModel, preserved
from torchprune_bayes.calibration.randomness import IsolatedRandomness
from torchprune_bayes.calibration.verification import check_finite_gradients
from torchprune_bayes.errors import ArgumentError


@dataclass(frozen=True)
class GradientPass:
    """What one pass over the samples needs.

    Attributes:
        functional: The model.
        samples: The samples.
        rows: How gradients are computed.
        targets: The labels.
        randomness: Random states in which the model runs.
        chunk_bytes: Memory for the gradients of one chunk and their activations.
        progress: Whether to show a progress bar.
    """

    functional: FunctionalModel
    samples: CalibrationSamples
    rows: GradientRows
    targets: FisherTargets
    randomness: IsolatedRandomness
    chunk_bytes: int
    progress: bool

    def gradients(
        self,
        weights: Mapping[str, Tensor] | None,
        remaining: RemainingVector,
        span: tuple[int, int],
        out: Tensor | None = None,
        first: int = 0,
    ) -> Iterator[Tensor]:
        """Stream the gradients from number ``first`` on, ``[rows, stop - start]``.

        Args:
            weights: Values to take the gradients at, by qualified name.
            remaining: Which entries take part, and in which order.
            span: Range ``(start, stop)`` of the remaining vector.
            out: Memory for all rows from ``first`` on.
            first: Gradients to leave out; their samples are drawn.

        Raises:
            ArgumentError: If there are no entries in the range.
            CalibrationError: If a gradient is not finite.
        """
        touched = remaining.overlap(*span)
        if not touched:
            raise ArgumentError(
                f"Expected remaining entries in the range {span[0]}:{span[1]}, got none."
            )
        room = GradientRoom(remaining, touched, out)
        for rows in self._chunks(weights, [name for name, _, _ in touched], room, first):
            if not torch.isfinite(rows.sum()):  # a sum may also overflow, so look closer
                check_finite_gradients(room.columns(rows))
            yield rows

    def _chunks(
        self,
        weights: Mapping[str, Tensor] | None,
        names: list[str],
        room: GradientRoom,
        first: int,
    ) -> Iterator[Tensor]:
        leaves, constants = self.functional.bind(weights, names)
        size = self.rows.samples_at_once(leaves, self.chunk_bytes)
        skipped = first * self.rows.mini_batch
        with tqdm(
            total=self.samples.number, initial=skipped, unit="sample", disable=not self.progress
        ) as bar:
            for pieces in self.samples.groups(size, skipped):
                # The model must not be modified while the caller has the rows.
                with preserved(self.functional.model), self.randomness:
                    pieces = [self.targets.put_into(piece, leaves, constants) for piece in pieces]
                    ready = self.rows.compute(self.functional, leaves, constants, pieces, room)
                yield from ready
                bar.update(samples_in(pieces))
