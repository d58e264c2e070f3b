"""Weights to differentiate a calibration's loss by."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torchprune_bayes.calibration import Calibration


def leaves_of(
    calibration: Calibration, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Leaf tensors that require gradients, in device and dtype of the calibration's passes.

    Args:
        calibration: The calibration; its model is not touched.
        weights: Values by qualified name; default the model's own.
    """
    values = calibration.space.values() if weights is None else weights
    return {
        name: value.detach().to(calibration.device, calibration.dtype).requires_grad_()
        for name, value in values.items()
    }
