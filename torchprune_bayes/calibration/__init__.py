"""From a model, data and a loss to gradients: see :class:`Calibration`."""

from torchprune_bayes.calibration._batches import Batch, batch_size
from torchprune_bayes.calibration.calibration import Calibration, MeanLoss

__all__ = ["Batch", "Calibration", "MeanLoss", "batch_size"]
