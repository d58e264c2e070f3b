"""Batches of data loaders and Hugging Face collators, cut into samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes.errors import ArgumentTypeError, CalibrationError

Batch = Any
"""``(input, target)``, or a mapping such as Hugging Face collators make."""


def map_tensors(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Apply ``function`` to every tensor of nested mappings, tuples and lists.

    ``torch.utils._pytree`` would treat an unknown mapping, such as the ``BatchEncoding`` of
    transformers, as a leaf, and the batch would silently not be cut.

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
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(batch, collect)
    return tensors


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


def without(pieces: Iterable[Batch], skipped: int) -> Iterator[Batch]:
    """Yield the parts without their first ``skipped`` samples."""
    for piece in pieces:
        samples = batch_size(piece)
        if skipped < samples:
            yield cut(piece, skipped, samples) if skipped > 0 else piece
        skipped = max(skipped - samples, 0)


def grouped(batches: Iterable[Batch], group_sizes: Iterable[int]) -> Iterator[list[Batch]]:
    """Cut batches into consecutive groups of ``group_sizes`` samples, each a list of parts.

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
    """One batch of the samples of all parts; ``None`` where their shapes or keys differ."""
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


def same_tensors(first: Batch, second: Batch) -> bool:
    """Whether two batches hold the same tensors; NaN equals NaN."""
    ours, others = tensors_in(first), tensors_in(second)
    return len(ours) == len(others) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
        for a, b in zip(ours, others, strict=True)
    )
