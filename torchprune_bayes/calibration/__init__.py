"""From a model, data and a loss to gradients: see :class:`Calibration`."""

from torchprune_bayes.calibration._batches import Batch
from torchprune_bayes.calibration.calibration import Calibration, MeanLoss

__all__ = ["Batch", "Calibration", "MeanLoss"]
