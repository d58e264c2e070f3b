"""Batches as data loaders and Hugging Face collators give them, cut into samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
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


class SampleStream:
    """The data, drawn the same way on every pass.

    Args:
        data: Any iterable of batches. One that can be iterated only once (an iterator) is kept
            in memory as far as it was drawn.
        seed: Seeds all generators while batches are drawn, those of a ``DataLoader`` included.
    """

    def __init__(self, data: Iterable[Batch], seed: int) -> None:
        if not isinstance(data, Iterable):
            raise ArgumentTypeError(
                f"Expected `data` to be an iterable of batches, got {type(data).__name__}."
            )
        self.data = _Replayed(data) if isinstance(data, Iterator) else data
        self.seed = seed

    def pieces(self, sizes: Iterable[int]) -> Iterator[list[Batch]]:
        """Cut the stream into consecutive groups of ``sizes`` samples.

        A group that spans several batches comes as several pieces, because batches that were
        padded to different lengths cannot be joined.

        Yields:
            One list of pieces per size; the last one may hold fewer samples if the data ends.
        """
        with self._batches() as batches:
            current: Batch = None
            position = available = 0
            for size in sizes:
                group: list[Batch] = []
                missing = size
                while missing:
                    if position == available:
                        current = next(batches, None)
                        if current is None:
                            break
                        position, available = 0, batch_size(current)
                    taken = min(missing, available - position)
                    group.append(cut(current, position, position + taken))
                    position, missing = position + taken, missing - taken
                if group:
                    yield group
                if missing:
                    return

    def count(self) -> int:
        """Number of samples in the data, found by drawing them all once."""
        with self._batches() as batches:
            return sum(batch_size(batch) for batch in batches)

    @contextmanager
    def _batches(self) -> Iterator[Iterator[Batch]]:
        # The global generators are swapped in only while a batch is drawn; a loader's own
        # generators are seeded for the pass and put back after it.
        randomness = IsolatedRandomness(self.seed)
        generators = _generators_of(self.data)
        states = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(self.seed)
        try:
            yield _draw(self.data, randomness)
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _draw(data: Iterable[Batch], randomness: IsolatedRandomness) -> Iterator[Batch]:
    with randomness:
        iterator = iter(data)
    while True:
        with randomness:
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def _generators_of(data: Any) -> list[torch.Generator]:
    owners = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


class _Replayed:
    """An iterator's items, kept as they are drawn so that they can be drawn again."""

    def __init__(self, iterator: Iterator[Batch]) -> None:
        self._iterator = iterator
        self._kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        yield from self._kept
        while fresh := list(islice(self._iterator, 1)):
            self._kept += fresh
            yield fresh[0]
