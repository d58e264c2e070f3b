"""How a loss reads logits and labels, determined from one evaluated batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, pad

IGNORED = -100
"""The label without a term in the loss, as in PyTorch and in Hugging Face's collators."""


@dataclass(frozen=True)
class LabelLayout:
    """A loss that is the mean negative log-likelihood of labels, and where their logits are.

    Attributes:
        classes: Dimension of the classes in the logits: -1 for ``[B, ..., C]``, 1 for dense
            predictions ``[B, C, H, W]``; ``None`` for two classes with one logit per label, of the
            labels' shape.
        shift: Positions by which the loss shifts labels against logits: 1 for language models.
        ignore_index: Label without a term in the loss; with one logit per label there is none.

    Example:
        >>> logits, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
        >>> layout_of(cross_entropy(logits, labels), logits, labels).classes
        1
    """

    classes: int | None = -1
    shift: int = 0
    ignore_index: int = IGNORED

    def counted(self, labels: Tensor) -> Tensor:
        """Mask of the labels that are not ignored, boolean, shaped like the labels."""
        if self.classes is None:
            return torch.ones_like(labels, dtype=torch.bool)
        counted = labels != self.ignore_index
        return pad(counted[..., self.shift :], (0, self.shift)) if self.shift else counted

    def classes_last(self, logits: Tensor) -> Tensor:
        """Logits ``[*labels, C]``, or those of the second class, ``[*labels]``."""
        return logits if self.classes is None else logits.movedim(self.classes, -1)

    def as_logits(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`classes_last`."""
        return values if self.classes is None else values.movedim(-1, self.classes)

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Classes drawn from the model's predictions, one for each place of the labels.

        One uniform number is drawn per place, on the CPU, so that the draws depend neither on the
        device nor on how samples are cut into batches.
        """
        logits = self.classes_last(logits)
        if self.classes is None:
            uniform = torch.rand(logits.shape, generator=generator).to(logits)
            return (uniform < logits.sigmoid()).long()
        uniform = torch.rand(logits.shape[:-1], generator=generator).to(logits).unsqueeze(-1)
        below = logits.softmax(-1).cumsum(-1) < uniform
        return below.sum(-1).clamp_max(logits.shape[-1] - 1)

    def as_labels(self, drawn: Tensor, labels: Tensor) -> Tensor:
        """Drawn classes in place of the labels that are not ignored; the others are kept."""
        drawn = drawn.to(labels.dtype)
        if self.classes is None:
            return drawn
        if self.shift:
            drawn = torch.cat([labels[..., : self.shift], drawn[..., : -self.shift]], dim=-1)
        return torch.where(labels == self.ignore_index, labels, drawn)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean negative log-likelihood."""
        if self.classes is None:
            return binary_cross_entropy_with_logits(logits, labels.to(logits))
        length = labels.shape[-1] - self.shift if labels.ndim else None
        kept = self.classes_last(logits)
        kept = kept[..., :length, :] if self.shift else kept
        labels = labels[..., self.shift :].flatten()
        return cross_entropy(kept.flatten(0, -2), labels, ignore_index=self.ignore_index)


def layout_of(
    loss: Tensor, logits: Any, labels: Any, ignore_index: int = IGNORED
) -> LabelLayout | None:
    """The layout in which ``loss`` is the mean negative log-likelihood; ``None`` if there is none.

    Args:
        loss: The loss of the batch, a scalar.
        logits: The model's output, or ``None``.
        labels: Labels of the batch, or ``None``.
        ignore_index: Label without a term.
    """
    if not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
        return None
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    for layout in _possible(logits, labels, ignore_index):
        expected = layout.loss(logits, labels).to(loss)
        if torch.isclose(expected, loss.detach(), rtol=1e-5, atol=1e-7, equal_nan=True):
            return layout
    return None


def _possible(logits: Tensor, labels: Tensor, ignore_index: int) -> Iterator[LabelLayout]:
    """Layouts that the shapes and the numbers allow."""
    if not logits.is_floating_point():
        return
    if not labels.is_floating_point():
        for classes in (-1, 1):
            shape = list(logits.shape)
            if len(shape) < (2 if classes == -1 else 3):
                continue
            largest = shape.pop(classes)
            if shape == list(labels.shape) and _are_classes(labels, largest, ignore_index):
                shifts = range(min(labels.ndim, 2) if classes == -1 else 1)
                yield from (LabelLayout(classes, shift, ignore_index) for shift in shifts)
    if logits.shape == labels.shape and bool(((labels == 0) | (labels == 1)).all()):
        yield LabelLayout(None, 0, ignore_index)


def _are_classes(labels: Tensor, classes: int, ignore_index: int) -> bool:
    return bool(((labels == ignore_index) | ((labels >= 0) & (labels < classes))).all())
