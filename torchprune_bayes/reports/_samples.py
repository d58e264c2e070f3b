"""Contribution of each sample to the metrics: checked logits and labels, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchprune_bayes._checks import check_finite
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError

IGNORED_LABEL = -100
"""The label that marks positions without a target, as in ``torch.nn.CrossEntropyLoss``."""

STATISTICS = 6
"""Columns of :func:`statistics_of`."""

_CHUNK_ENTRIES = 2**22  # logits in float64 at a time: 32 MiB, whatever the vocabulary
_TOP = 5


def chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield float64 logits `[n, K]` and labels `[n]` of positions that are not ignored."""
    _check_pair(logits, labels)
    classes = logits.shape[-1]
    rows = max(1, _CHUNK_ENTRIES // classes)
    flat_logits = logits.detach().reshape(-1, classes)
    flat_labels = labels.reshape(-1).to(logits.device)
    for part, targets in zip(flat_logits.split(rows), flat_labels.split(rows), strict=True):
        counted = targets != IGNORED_LABEL
        part, targets = part[counted], targets[counted].long()
        check_finite("logits", part)
        outside = targets[(targets < 0) | (targets >= classes)]
        if outside.numel():
            raise ArgumentError(
                f"Expected `labels` in [0, {classes}) or {IGNORED_LABEL}, got {int(outside[0])}."
            )
        part = wide(part)
        yield part, targets.to(part.device)


def _check_pair(logits: Tensor, labels: Tensor) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise ArgumentTypeError(
            f"Expected `logits` to be a floating tensor, got {getattr(logits, 'dtype', logits)!r}."
        )
    integer = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not integer or labels.dtype == torch.bool:
        raise ArgumentTypeError(
            f"Expected `labels` to be an integer tensor, got {getattr(labels, 'dtype', labels)!r}."
        )
    if logits.ndim < 2 or logits.shape[-1] < 2 or labels.shape != logits.shape[:-1]:
        raise ArgumentError(
            "Expected `logits` [..., K] of K >= 2 classes and `labels` [...], "
            f"got {list(logits.shape)} and {list(labels.shape)}."
        )


def statistics_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `[n, 6]`: one, correct, right among five, confidence, NLL, Brier score."""
    probabilities = logits.softmax(dim=1)
    confidence = probabilities.amax(dim=1)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    # p - one_hot before squaring: 1 - 2 p_y + Σ p² would cancel for confident models.
    errors = probabilities.scatter_add_(1, labels[:, None], -torch.ones_like(logits[:, :1]))
    brier = errors.square().sum(dim=1)
    before = _classes_before(logits, labels)
    one = torch.ones_like(nll)
    correct, top5 = (before < 1).to(nll.dtype), (before < _TOP).to(nll.dtype)
    return torch.stack([one, correct, top5, confidence, nll, brier], dim=1)


def _classes_before(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label, by their logits: probabilities may tie, `[n]`."""
    own = logits.gather(1, labels[:, None])
    tie_before = (logits == own) & (
        torch.arange(logits.shape[1], device=own.device) < labels[:, None]
    )
    return ((logits > own) | tie_before).sum(dim=1)
