"""Batches as data loaders and Hugging Face collators give them, cut into samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes.calibration._randomness import IsolatedRandomness
from torchprune_bayes.errors import ArgumentTypeError, CalibrationError

Batch = Any
"""``(input, target)``, or a mapping such as Hugging Face collators make."""


def map_tensors(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Apply ``function`` to every tensor of a nest of mappings, tuples and lists.

    Example:
        >>> map_tensors({"ids": torch.zeros(2, 3), "name": "x"}, lambda t: t[0])
        {'ids': tensor([0., 0., 0.]), 'name': 'x'}
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(map_tensors(value, function) for value in batch)
    return batch


def tensors_in(batch: Batch) -> list[Tensor]:
    """List the tensors of a batch, in order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, collect)
    return found


def batch_size(batch: Batch) -> int:
    """Return the common leading dimension of the tensors of a batch.

    Raises:
        ArgumentTypeError: If the batch is neither a pair nor a mapping, or holds no tensor.
        CalibrationError: If its tensors disagree about their leading dimension.
    """
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    tensors = tensors_in(batch)
    if not (is_pair or isinstance(batch, Mapping)) or not tensors:
        raise ArgumentTypeError(
            "Expected batches to be (input, target) pairs or mappings of tensors, "
            f"got {type(batch).__name__}."
        )
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) > 1 or 0 in sizes:
        raise CalibrationError(
            "Expected all tensors of a batch to have the batch as their first dimension, "
            f"got first dimensions {sorted(sizes)}."
        )
    return sizes.pop()


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Return the samples ``start:stop`` of a batch."""
    return map_tensors(batch, lambda tensor: tensor[start:stop])


def samples_in(pieces: Iterable[Batch]) -> int:
    """Number of samples in several batches."""
    return sum(batch_size(piece) for piece in pieces)


def grouped(batches: Iterable[Batch], group_sizes: Iterable[int]) -> Iterator[list[Batch]]:
    """Cut batches into consecutive groups of ``group_sizes`` samples, each a list of pieces.

    Stops drawing with the last group; the last one may hold fewer samples if the batches end.
    """
    wanted = iter(group_sizes)
    missing, group = next(wanted, 0), []
    for batch in batches:
        start, stop = 0, batch_size(batch)
        while missing and start < stop:
            taken = min(missing, stop - start)
            group.append(cut(batch, start, start + taken))
            start, missing = start + taken, missing - taken
            if not missing:
                yield group
                missing, group = next(wanted, 0), []
        if not missing:
            return
    if group:
        yield group


def joined(pieces: list[Batch]) -> Batch | None:
    """One batch of the samples of all pieces; ``None`` where their shapes or keys differ."""
    if len(pieces) == 1:
        return pieces[0]
    parts = [tensors_in(piece) for piece in pieces]
    alike = all(
        len(part) == len(parts[0])
        and all(a.shape[1:] == b.shape[1:] for a, b in zip(part, parts[0], strict=True))
        for part in parts
    )
    if not alike:
        return None
    columns = iter([torch.cat(column) for column in zip(*parts, strict=True)])
    return map_tensors(pieces[0], lambda _: next(columns))


def sizes(total: int, size: int) -> Iterator[int]:
    """Split ``total`` into parts of ``size``, the last one smaller where it does not divide.

    Example:
        >>> list(sizes(7, 3))
        [3, 3, 1]
    """
    yield from repeat(size, total // size)
    if total % size:
        yield total % size


class SampleStream:
    """The data, drawn the same way on every pass.

    Args:
        data: Any iterable of batches. One that can be iterated only once (an iterator) is kept
            in memory as far as it was drawn.
        seed: Seeds all generators while batches are drawn, those of a ``DataLoader`` included.
        device: The device whose generator is seeded beside the CPU's.
    """

    def __init__(self, data: Iterable[Batch], seed: int, device: torch.device | None) -> None:
        if not isinstance(data, Iterable):
            raise ArgumentTypeError(
                f"Expected `data` to be an iterable of batches, got {type(data).__name__}."
            )
        self.data = _Replayed(data) if isinstance(data, Iterator) else data
        self.seed = seed
        self.device = device

    def reseeded(self, seed: int) -> SampleStream:
        """The same data, drawn in another way."""
        return SampleStream(self.data, seed, self.device)

    def pieces(self, group_sizes: Iterable[int]) -> Iterator[list[Batch]]:
        """Cut the stream into consecutive groups of ``group_sizes`` samples.

        A group that spans several batches comes as several pieces, because batches that were
        padded to different lengths cannot be joined.

        Yields:
            One list of pieces per size; the last one may hold fewer samples if the data ends.
        """
        yield from grouped(self._batches(), group_sizes)

    def count(self) -> int:
        """Number of samples in the data, found by drawing them all once."""
        return samples_in(self._batches())

    def following(self, skipped: int, wanted: int, size: int, room_bytes: float) -> list[Batch]:
        """Draw the samples after the first ``skipped`` ones, as far as they fit, at least one.

        Args:
            skipped: Samples to pass over.
            wanted: Samples to return at most.
            size: Largest batch.
            room_bytes: Size of all returned batches at most, save of the first sample.
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
        # All generators are swapped in only while a batch is drawn, so that a pass that is left
        # half-way, in whatever manner, has nothing to put back.
        randomness = IsolatedRandomness(self.seed, self.device, _generators_of(self.data))
        with randomness:
            batches = iter(self.data)
        while True:
            with randomness:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def _generators_of(data: Any) -> list[torch.Generator]:
    batch_sampler = getattr(data, "batch_sampler", None)
    nested = [getattr(batch_sampler, "sampler", None), getattr(data, "dataset", None)]
    owners = [data, getattr(data, "sampler", None), batch_sampler, *nested]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


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
