"""Labels drawn from the model itself, for the true Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchprune_bayes.calibration._batches import Batch
from torchprune_bayes.calibration._functional import FunctionalModel
from torchprune_bayes.errors import CalibrationError

_IGNORED = -100  # as in torch.nn.functional.cross_entropy and in Hugging Face's collators


class FisherTargets:
    """The labels of one pass: the data's own, or for the true Fisher drawn from the model.

    Draws replace integer labels by classes from the softmax of the model's logits; labels of -100
    stay. A language model whose loss compares the logits at ``t`` with the label at ``t + 1`` gets
    its draws at ``t + 1``. One uniform number is drawn per label, so that the draws do not depend
    on how the samples are cut into batches.

    Args:
        functional: The model.
        fisher: ``"empirical"`` or ``"true"``.
        seed: Seed of the draws.
    """

    def __init__(self, functional: FunctionalModel, fisher: str, seed: int) -> None:
        self._functional = functional
        self._fisher = fisher
        self._generator = torch.Generator().manual_seed(seed)

    def put_into(
        self, batch: Batch, leaves: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> Batch:
        """Return the batch, an ``(input, target)`` pair or a mapping, with the labels in it.

        Raises:
            CalibrationError: If logits ``[*labels.shape, classes]`` do not fit the labels, or the
                loss is not their mean cross-entropy.
        """
        if self._fisher == "empirical":
            return batch
        with torch.no_grad():
            output, target = self._functional.output(leaves, constants, batch)
            loss = self._functional.loss_of(output, target)
        logits = getattr(output, "logits", output)
        labels: Any = batch.get("labels") if isinstance(batch, Mapping) else target
        _check_fit(logits, labels)
        drawn = self._draw(logits, labels, _label_shift(loss, logits, labels))
        return {**batch, "labels": drawn} if isinstance(batch, Mapping) else (batch[0], drawn)

    def _draw(self, logits: Tensor, labels: Tensor, shift: int) -> Tensor:
        uniform = torch.rand(labels.shape, generator=self._generator).to(logits)
        below = logits.softmax(-1).cumsum(-1) < uniform.unsqueeze(-1)
        drawn = below.sum(-1).clamp_max(logits.shape[-1] - 1).to(labels.dtype)
        if shift:
            drawn = torch.cat([labels[..., :shift], drawn[..., :-shift]], dim=-1)
        return torch.where(labels == _IGNORED, labels, drawn)


def _label_shift(loss: Tensor, logits: Tensor, labels: Tensor) -> int:
    """How many places the loss moves the labels against the logits: 0, or 1 in language models."""
    for shift in range(min(labels.ndim, 2)):
        length = labels.shape[-1] - shift
        kept = logits[..., :length, :].flatten(0, -2)
        plain = cross_entropy(kept, labels[..., shift:].flatten(), ignore_index=_IGNORED)
        if torch.isclose(plain.to(loss), loss, rtol=1e-5, atol=1e-7, equal_nan=True):
            return shift
    raise CalibrationError(
        "Expected the mean cross-entropy of the logits as the loss for fisher='true', got another "
        f"loss ({float(loss):.6g}): labels drawn from a softmax would not belong to it."
    )


def _check_fit(logits: object, labels: object) -> None:
    fits = (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and not labels.is_floating_point()
        and logits.shape[:-1] == labels.shape
    )
    if not fits:
        raise CalibrationError(
            "Expected logits [*labels.shape, classes] and integer labels for fisher='true', "
            f"got {tuple(getattr(logits, 'shape', ()))} and {tuple(getattr(labels, 'shape', ()))}."
        )
