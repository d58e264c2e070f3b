"""One pass over the samples of a calibration, as rows of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from tqdm.auto import tqdm

from torchprune_bayes.calibration._room import GradientRoom
from torchprune_bayes.calibration._rows import GradientRows
from torchprune_bayes.calibration._samples import CalibrationSamples
from torchprune_bayes.calibration.batches import samples_in
from torchprune_bayes.calibration.fisher_targets import FisherTargets
from torchprune_bayes.calibration.functional import FunctionalModel, preserved
from torchprune_bayes.calibration.randomness import IsolatedRandomness
from torchprune_bayes.calibration.request import GradientRequest
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

    def gradients(self, request: GradientRequest) -> Iterator[Tensor]:
        """Stream gradients, ``[rows, stop - start]``.

        Raises:
            ArgumentError: If there are no entries in the range.
            CalibrationError: If a gradient is not finite.
        """
        touched = request.remaining.overlap(*request.span)
        if not touched:
            start, stop = request.span
            raise ArgumentError(
                f"Expected remaining entries in the range {start}:{stop}, got none."
            )
        room = GradientRoom(request.remaining, touched, request.out)
        names = [name for name, _, _ in touched]
        leaves, constants = self.functional.bind(request.weights, names)
        for rows in self._chunks(leaves, constants, room, request.first * self.rows.mini_batch):
            if not torch.isfinite(rows.sum()):  # a sum may also overflow, so look closer
                check_finite_gradients(room.columns(rows))
            yield rows

    def _chunks(
        self,
        leaves: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        room: GradientRoom,
        skipped: int,
    ) -> Iterator[Tensor]:
        size, total = self.rows.samples_at_once(leaves, self.chunk_bytes), self.samples.number
        with tqdm(
            total=total, initial=skipped, unit="sample", disable=not self.progress
        ) as progress:
            begin = perf_counter()
            for pieces in self.samples.groups(size, skipped):
                # The model must not be modified while the caller has the rows.
                with preserved(self.functional.model), self.randomness:
                    pieces = [self.targets.put_into(piece, leaves, constants) for piece in pieces]
                    ready = self.rows.compute(self.functional, leaves, constants, pieces, room)
                self.rows.cost.add(sum(map(len, ready)), perf_counter() - begin)
                yield from ready
                progress.update(samples_in(pieces))
                begin = perf_counter()
