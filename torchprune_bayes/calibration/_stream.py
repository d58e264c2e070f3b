"""The data as a stream of samples that is drawn the same way on every pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from torchprune_bayes.calibration.batches import (
    Batch,
    batch_size,
    cut,
    grouped,
    joined,
    same_tensors,
    samples_in,
    sizes,
    tensors_in,
)
from torchprune_bayes.calibration.randomness import IsolatedRandomness
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.seeds import derived_seed


class Placed(Protocol):
    """An object with a device."""

    @property
    def device(self) -> torch.device:
        """The present device."""
        ...


class SampleStream:
    """The data, drawn the same way on every pass.

    Args:
        data: Any iterable of batches. One that can be iterated only once (an iterator) is kept
            in memory once drawn.
        seed: Seeds all generators while batches are drawn, those of a ``DataLoader`` included.
        placed: Object with the device whose generator is seeded, in addition to the CPU's.
    """

    def __init__(self, data: Iterable[Batch], seed: int, placed: Placed | None = None) -> None:
        if not isinstance(data, Iterable):
            raise ArgumentTypeError(
                f"Expected `data` to be an iterable of batches, got {type(data).__name__}."
            )
        self.data = _Replayed(data) if isinstance(data, Iterator) else data
        self.seed = seed
        self._placed = placed
        self._known: dict[str, int] = {}  # of the data, so shared by all draws

    def reseeded(self, seed: int) -> SampleStream:
        """The same data, drawn with another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def pieces(self, group_sizes: Iterable[int]) -> Iterator[list[Batch]]:
        """Cut the stream into consecutive groups of ``group_sizes`` samples.

        A group that spans several batches consists of several parts, because batches that were
        padded to different lengths cannot be joined.

        Yields:
            One list of parts per size; the last one may hold fewer samples if the data ends.
        """
        yield from grouped(self._batches(), group_sizes)

    def drawn(
        self, index: int, samples: int, reserved: int, group_sizes: Iterable[int]
    ) -> Iterator[list[Batch]]:
        """As :meth:`pieces`, for the ``index``-th draw of ``samples`` samples.

        Data whose order depends on the seed are drawn from their start: the seed
        determines the draw. Other data are continued from the end of the previous draw, and
        restarted when they end.

        Args:
            index: Number of the draw; 0 is the first.
            samples: Samples of every draw.
            reserved: Samples after those of the first draw that no later one takes, because they
                are held out.
            group_sizes: Samples of each group.
        """
        if not index or self.shuffles:
            return self.pieces(group_sizes)
        return grouped(self._going_on(index * samples, samples, reserved), group_sizes)

    @property
    def shuffles(self) -> bool:
        """Whether the order of the data changes with the seed; checked by drawing two batches."""
        if "shuffles" not in self._known:
            self._known["shuffles"] = self._has_random_order()
        return bool(self._known["shuffles"])

    def count(self, limit: int | None = None) -> int:
        """Number of samples in the data, up to a limit, by drawing them once."""
        if limit is None:
            return samples_in(self._batches())
        what = f"up to {limit}"
        if what not in self._known:
            groups = self.pieces(sizes(limit, 1024))
            self._known[what] = sum(samples_in(pieces) for pieces in groups)
        return self._known[what]

    def length(self) -> int:
        """Number of samples in the data; drawn at most once, of a plain loader not at all."""
        if "length" not in self._known:
            self._known["length"] = _length(self.data) or self.count()
        return self._known["length"]

    def following(self, skipped: int, wanted: int, size: int, room_bytes: float) -> list[Batch]:
        """Draw the samples after the first ``skipped`` ones, as far as they fit, at least one.

        Args:
            skipped: Samples to pass over.
            wanted: Samples to return at most.
            size: Largest batch.
            room_bytes: Largest size of all returned batches, except for the first sample.
        """
        before = list(sizes(skipped, size))
        groups = self.pieces(chain(before, sizes(wanted, size)))
        kept: list[Batch] = []
        for pieces in islice(groups, len(before), None):
            batch = joined(pieces)
            for part in pieces if batch is None else [batch]:
                sample_bytes = sum(tensor.nbytes for tensor in tensors_in(part)) / batch_size(part)
                fitting = max(int(room_bytes / sample_bytes), 0 if kept else 1)
                if fitting:
                    kept.append(cut(part, 0, fitting))
                if fitting < batch_size(part):
                    return kept
                room_bytes -= batch_size(part) * sample_bytes
        return kept

    def _batches(self) -> Iterator[Batch]:
        device = None if self._placed is None else self._placed.device
        # All generators are swapped in only while a batch is drawn, so that a pass that stops
        # half-way, for any reason, has nothing to restore.
        randomness = IsolatedRandomness(self.seed, device, _generators_of(self.data))
        with randomness:
            batches = iter(self.data)
        while True:
            with randomness:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def _going_on(self, skipped: int, samples: int, reserved: int) -> Iterator[Batch]:
        """The batches after ``skipped`` samples, repeating the data, without the reserved ones."""
        round_of = f"round without {samples}:{samples + reserved}"
        skipped %= self._known.get(round_of, skipped + 1)
        while True:
            passed = length = 0
            for batch in self._batches():
                for low, high in ((0, samples), (samples + reserved, float("inf"))):
                    start = max(low - passed, 0)
                    stop = int(min(high - passed, batch_size(batch)))
                    if start >= stop:
                        continue
                    length += stop - start
                    start, skipped = min(start + skipped, stop), max(start + skipped - stop, 0)
                    if start < stop:
                        yield cut(batch, start, stop)
                passed += batch_size(batch)
            if length < samples:  # fewer than asked, which whoever asked finds out
                return
            self._known[round_of] = length  # so that no later draw passes over whole rounds
            skipped %= length

    def _has_random_order(self) -> bool:
        batch_sampler = getattr(self.data, "batch_sampler", None)
        if type(batch_sampler) is BatchSampler:
            # Batches of the same samples may still differ, where these are augmented at random.
            if isinstance(batch_sampler.sampler, SequentialSampler):
                return False
            if isinstance(batch_sampler.sampler, RandomSampler):
                return True
        again = self.reseeded(derived_seed(self.seed, "order"))
        first, second = (next(stream._batches(), None) for stream in (self, again))
        return not same_tensors(first, second)


def _length(data: Any) -> int | None:
    """Samples of a plain loader, without drawing them."""
    sampler = getattr(data, "batch_sampler", None)
    if type(data) is not DataLoader or type(sampler) is not BatchSampler:
        return None
    if not isinstance(sampler.sampler, (SequentialSampler, RandomSampler)):
        return None
    samples = len(sampler.sampler)
    return samples - samples % sampler.batch_size if sampler.drop_last else samples


def _generators_of(data: Any) -> list[torch.Generator]:
    batch_sampler = getattr(data, "batch_sampler", None)
    nested = [getattr(batch_sampler, "sampler", None), getattr(data, "dataset", None)]
    owners = [data, getattr(data, "sampler", None), batch_sampler, *nested]
    generators = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


class _Replayed:
    """An iterator's items, kept as they are drawn so that they can be drawn again."""

    def __init__(self, iterator: Iterator[Batch]) -> None:
        self._iterator = iterator
        self._kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        index = 0  # rather than an iterator of the list, because passes may be interleaved
        while index < len(self._kept) or self._draw():
            yield self._kept[index]
            index += 1

    def _draw(self) -> bool:
        for item in self._iterator:
            self._kept.append(item)
            return True
        return False
