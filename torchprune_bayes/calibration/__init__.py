"""Gradients from a model, data and a loss, see :class:`Calibration`."""

from torchprune_bayes.calibration._held_out import MeanLoss
from torchprune_bayes.calibration._rows import GradientCost
from torchprune_bayes.calibration.batches import (
    Batch,
    batch_size,
    cut,
    grouped,
    joined,
    map_tensors,
    sizes,
)
from torchprune_bayes.calibration.calibration import Calibration
from torchprune_bayes.calibration.checkpointed import CheckpointedCalibration
from torchprune_bayes.calibration.functional import LossFunction, preserved
from torchprune_bayes.calibration.labels import IGNORED, LabelLayout, layout_of

__all__ = [
    "IGNORED",
    "Batch",
    "Calibration",
    "CheckpointedCalibration",
    "GradientCost",
    "LabelLayout",
    "LossFunction",
    "MeanLoss",
    "batch_size",
    "cut",
    "grouped",
    "joined",
    "layout_of",
    "map_tensors",
    "preserved",
    "sizes",
]
