"""Trials of a loss curve: a group loses units, its readers are fitted anew, the loss is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes.calibration import Batch, Calibration, batch_size
from torchprune_bayes.calibration.batches import cut
from torchprune_bayes.structured._pairs import Pairs
from torchprune_bayes.structured._playback import Calls, Playback
from torchprune_bayes.structured._reader import Reader, Statistics, matched
from torchprune_bayes.structured._readers import (
    Tensors,
    first_samples,
    in_pieces,
    installed,
    leading,
    readers_of,
    rows_that_go,
    survey,
    watched,
    without_rows,
)
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.slicing import first_names

MOST_SAMPLES = 512
"""For the fits."""

_ACTIVATION_BYTES, _CPU_BATCH = 2**25, 128
"""Of the largest layer in a batch on a CPU: with a ResNet-18 on 224 pixels larger ones cost the
system as much again as a third of the arithmetic."""


class Trials:
    """Losses of a model in which the readers of one group are fitted without some of its units.

    Args:
        calibration: Data, model and loss, on the tensors of all groups.
        damping: Ridge of the fits.
        tried: Samples of each loss.
    """

    def __init__(self, calibration: Calibration, damping: float, tried: int) -> None:
        self._calibration, self._damping = calibration, damping
        batches = list(first_samples(calibration, MOST_SAMPLES))
        size = _batch_size(calibration, cut(batches[0], 0, 1))
        self._batches = in_pieces(batches, size)
        self._samples = sum(batch_size(batch) for batch in self._batches)
        self._tried = list(leading(self._batches, tried))
        self._calls = Calls(calibration, cut(batches[0], 0, 1))
        self._readers: dict[str, Reader] = {}
        self._outputs: dict[str, Statistics] = {}
        self._pairs = Pairs(calibration.model, [])
        self._first, _ = first_names(calibration.model)

    def playback(self) -> Playback:
        """For the trials of one group."""
        room = self._calibration.memory.gradients_bytes
        return Playback(self._calls, room, self._tried, self._loss_of)

    def loss(self, tensors: Tensors, playback: Playback | None = None) -> float:
        """Mean loss with other tensors in the model; infinite if it is NaN."""
        playback = self.playback() if playback is None else playback
        with installed(tensors):
            losses = playback.losses(tensors.keys())
        return _mean(losses, self._tried)

    def _loss_of(self, batch: Batch) -> float:
        with torch.no_grad():
            return float(self._calibration.loss(None, batch))

    def parts(self, groups: Sequence[UnitGroup]) -> list[list[UnitGroup]]:
        """Divide groups such that the moments of each part fit into memory at once."""
        room, held = self._calibration.memory.factor_bytes, 0
        parts: list[list[UnitGroup]] = [[]]
        for group in groups:
            readers, _ = readers_of(self._calibration.model, [group])
            pairs = Pairs(self._calibration.model, [group]).readers
            needed = sum(each.moment_bytes for each in [*readers.values(), *pairs.values()])
            if parts[-1] and held + needed > room:
                parts, held = [*parts, []], 0
            parts[-1].append(group)
            held += needed
        return parts

    def watch(self, groups: Sequence[UnitGroup]) -> None:
        """Collect the moments of all readers of some groups, in the whole model."""
        self._readers, _ = readers_of(self._calibration.model, groups)
        readers = list(self._readers.values())
        survey(self._calibration, cut(self._batches[0], 0, 1), readers)
        self._pairs = Pairs(self._calibration.model, groups)
        with watched([*readers, *self._pairs.readers.values()], self._samples):
            for batch in self._batches:
                self._loss_of(batch)
        for reader in readers:
            reader.summarise()
        self._outputs = {
            reader.name: reader.output_statistics()
            for reader in readers
            if reader.norm is not None and reader.summary is not None
        }

    def without(self, group: UnitGroup, gone: Tensor) -> Tensors:
        """Re-fit readers without some units, and the batch norms directly behind them."""
        rows = rows_that_go(self._calibration.model, [group], {group.name: gone})
        result = self._pairs.without([group], {group.name: gone}, self._damping)
        keeps: dict[str, Tensor] = {}
        for piece in group.slices:
            reader = self._readers.get(self._first.get(piece.name, ""))
            if piece.role != "consumer" or reader is None or reader.summary is None:
                continue  # what is not called does not matter to the loss
            keep = torch.ones(reader.weight.shape[reader.dim], dtype=torch.bool)
            keep = keeps.setdefault(reader.name, keep)
            keep[piece.positions.cpu()[gone.cpu()].flatten()] = False
        for name, keep in keeps.items():
            reader = self._readers[name]
            fitted = reader.refit(keep, self._damping)
            result[reader.module] = without_rows(
                reader.module, rows.get(reader.module, []), fitted.tensors
            )
            norm: Any = reader.norm
            if norm is not None and norm.running_mean is not None:
                result[norm] = matched(norm, self._outputs[name], fitted.outputs)
        return result


def _mean(losses: Sequence[float], batches: Sequence[Batch]) -> float:
    sizes = [batch_size(batch) for batch in batches]
    total = sum(loss * size for loss, size in zip(losses, sizes, strict=True))
    return total / sum(sizes) if total == total else float("inf")


def _batch_size(calibration: Calibration, sample: Batch) -> int:
    """Number of samples per batch: on a CPU so few that activations fit into its caches."""
    if calibration.device.type != "cpu":
        return MOST_SAMPLES
    return min(max(_ACTIVATION_BYTES // survey(calibration, sample, []), 1), _CPU_BATCH)
