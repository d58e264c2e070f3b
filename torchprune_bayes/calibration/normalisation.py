"""The normalisation of a batch's loss, determined on samples that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from torchprune_bayes.calibration.batches import Batch, batch_size, map_tensors

Normaliser = Literal["terms", "samples"]
"""A mean over all labels that count, or over samples whatever their number of labels."""

_OF_THE_SPREAD = 1e-3
_ROUNDING = 1e-5


def labels_in(batch: Batch) -> Any:
    """Labels of a batch, if any: the entry ``"labels"`` of a mapping, otherwise the target."""
    return batch.get("labels") if isinstance(batch, Mapping) else batch[1]


def counted_labels(labels: Any, ignore_index: int, shift: int = 0) -> Tensor | None:
    """Number of labels of each sample that are not ignored, ``[B]``; ``None`` without classes.

    Example:
        >>> counted_labels(torch.tensor([[1, -100], [2, 3]]), -100)
        tensor([1, 2])
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.ndim:
        return None
    labels = labels[..., shift:] if shift else labels
    return (labels != ignore_index).reshape(len(labels), -1).sum(1)


def differing_samples(batch: Batch, ignore_index: int, most: int) -> Batch:
    """Up to ``most`` samples that differ in the number of their labels, and in these.

    Samples without such labels are left out, unless there are no others.
    """
    labels = labels_in(batch)
    counts = counted_labels(labels, ignore_index)
    if counts is None:
        return map_tensors(batch, lambda tensor: tensor[:most])
    labels, counts = labels.cpu(), counts.cpu()  # a few numbers, and float64
    flat = labels.reshape(len(labels), -1).double()
    sums = torch.where(flat == ignore_index, 0.0, flat).sum(1)
    order = sums.argsort(stable=True)
    order = order[counts[order].argsort(stable=True)]
    order = order[counts[order] > 0] if bool(counts.any()) else order
    places = torch.linspace(0, len(order) - 1, min(most, len(order))).round().long()
    chosen = order[places.to(order.device)]
    return map_tensors(batch, lambda tensor: tensor[chosen.to(tensor.device)])


def differences_in(batch: Batch, ignore_index: int) -> frozenset[str]:
    """How the samples of a batch differ, ``"number of labels"`` and ``"labels"``."""
    labels = labels_in(batch)
    counts = counted_labels(labels, ignore_index)
    if counts is None or batch_size(batch) < 2:
        return frozenset()
    unlike = torch.stack([(counts != counts[0]).any(), (labels != labels[:1]).any()]).tolist()
    ways = ("number of labels", "labels")
    return frozenset(way for way, is_so in zip(ways, unlike, strict=True) if is_so)


def normaliser_of(
    loss: float,
    singles: Sequence[float],
    terms: Sequence[float],
    known: Normaliser = "terms",
) -> Normaliser | None:
    """The rule by which the loss of several samples is a mean.

    Args:
        loss: The loss of all of them as one batch.
        singles: The losses of each separately.
        terms: Number of labels of each that are not ignored.
        known: The rule to use if both fit.

    Returns:
        The rule; ``None`` if neither fits.

    Example:
        >>> normaliser_of(2.5, [1.0, 3.0], [1, 3]), normaliser_of(2.0, [1.0, 3.0], [1, 3])
        ('terms', 'samples')
        >>> normaliser_of(1.2, [1.0, 3.0], [1, 3]) is None  # class weights
        True
    """
    if not isfinite(loss) or not all(map(isfinite, singles)) or not sum(terms):
        return known  # for others to complain about
    size = max(abs(value) for value in (loss, *singles))
    room = _OF_THE_SPREAD * (max(singles) - min(singles)) + _ROUNDING * size
    by_terms = sum(m * value for m, value in zip(terms, singles, strict=True)) / sum(terms)
    by_samples = sum(singles) / len(singles)
    right: list[Normaliser] = []
    if abs(by_terms - loss) <= room:
        right.append("terms")
    if abs(by_samples - loss) <= room:
        right.append("samples")
    return known if known in right else next(iter(right), None)


def common_normaliser(
    groups: Sequence[tuple[float, Sequence[float], Sequence[float]]], known: Normaliser
) -> Normaliser | None:
    """The rule by which every group's loss is a mean, see :func:`normaliser_of`.

    Args:
        groups: The loss, those of single samples, and the labels of these that count, of each.
        known: The rule to use if both fit.

    Example:
        >>> common_normaliser([(2.5, [1.0, 3.0], [1, 3]), (2.0, [1.0, 3.0], [1, 1])], "samples")
        'terms'
    """
    rules: list[Normaliser] = ["terms", "samples"]
    for rule in sorted(rules, key=lambda rule: rule != known):
        if all(normaliser_of(*group, rule) == rule for group in groups):
            return rule
    return None
