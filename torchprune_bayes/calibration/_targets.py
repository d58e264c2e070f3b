"""Labels drawn from the model itself, for the true Fisher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchprune_bayes.calibration._batches import Batch
from torchprune_bayes.calibration._functional import FunctionalModel
from torchprune_bayes.errors import CalibrationError


def with_sampled_targets(
    functional: FunctionalModel,
    leaves: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    batch: Batch,
) -> Batch:
    """Replace a batch's integer labels by draws from the softmax of the model's logits.

    Args:
        functional: The model.
        leaves: The weights.
        constants: State that is not differentiated.
        batch: ``(input, target)`` or a mapping with ``"labels"``; labels of -100 stay.

    Raises:
        CalibrationError: If logits ``[*labels.shape, classes]`` do not fit the labels.
    """
    output, _ = functional.output(leaves, constants, batch)
    logits = getattr(output, "logits", output)
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or not isinstance(logits, Tensor)
        or logits.shape[:-1] != labels.shape
    ):
        raise CalibrationError(
            "Expected logits [*labels.shape, classes] and integer labels for fisher='true', "
            f"got {tuple(getattr(logits, 'shape', ()))} and {tuple(getattr(labels, 'shape', ()))}."
        )
    drawn = torch.distributions.Categorical(logits=logits).sample()
    drawn = torch.where(labels == -100, labels, drawn)
    return {**batch, "labels": drawn} if isinstance(batch, Mapping) else (batch[0], drawn)
