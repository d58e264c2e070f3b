"""Labels drawn from the model, for the true Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes.calibration.batches import Batch
from torchprune_bayes.calibration.functional import FunctionalModel
from torchprune_bayes.calibration.labels import IGNORED, layout_of
from torchprune_bayes.errors import CalibrationError


class FisherTargets:
    """The labels of one pass: the data's own, or for the true Fisher drawn from the model.

    Draws replace labels by classes from the model's predictions; ignored labels are kept. A
    language model whose loss compares the logits at ``t`` with the label at ``t + 1`` gets its
    draws at ``t + 1``. One uniform number is drawn per label, so that the draws do not depend on
    how the samples are cut into batches.

    Args:
        functional: The model.
        fisher: ``"empirical"`` or ``"true"``.
        seed: Seed of the draws.
        ignore_index: Label without a term in the loss.
    """

    def __init__(
        self, functional: FunctionalModel, fisher: str, seed: int, ignore_index: int = IGNORED
    ) -> None:
        self._functional = functional
        self._fisher = fisher
        self._ignore_index = ignore_index
        self._generator = torch.Generator().manual_seed(seed)

    def put_into(
        self, batch: Batch, leaves: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> Batch:
        """Return the batch, an ``(input, target)`` pair or a mapping, with the labels in it.

        Raises:
            CalibrationError: If the loss is not the mean cross-entropy of labels and logits.
        """
        if self._fisher == "empirical":
            return batch
        with torch.no_grad():
            output, target = self._functional.output(leaves, constants, batch)
            loss = self._functional.loss_of(output, target)
        logits = getattr(output, "logits", output)
        labels: Any = batch.get("labels") if isinstance(batch, Mapping) else target
        layout = layout_of(loss, logits, labels, self._ignore_index)
        if layout is None:
            raise CalibrationError(
                "Expected the mean cross-entropy of the logits, of shape [*labels, C], [B, C, ...] "
                "or [*labels], and integer labels for fisher='true', got another loss "
                f"({float(loss):.6g}) of {_described(logits)} and {_described(labels)}: labels "
                "drawn from the model would not belong to it. Labels without a term in the loss "
                "are named by ignore_index."
            )
        drawn = layout.as_labels(layout.draw(logits, self._generator), labels)
        return {**batch, "labels": drawn} if isinstance(batch, Mapping) else (batch[0], drawn)


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
