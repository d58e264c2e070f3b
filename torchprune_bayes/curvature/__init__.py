"""Statistics fitted to gradients, or to second derivatives, of the calibration loss."""

from torchprune_bayes.curvature.empirical_fisher import EmpiricalFisher
from torchprune_bayes.curvature.hessian import hessian_diagonal
from torchprune_bayes.curvature.layer_statistics import LayerStatistics
from torchprune_bayes.curvature.layers.parameters import trainable_parameters
from torchprune_bayes.curvature.layerwise import LayerCurvature

__all__ = [
    "EmpiricalFisher",
    "LayerCurvature",
    "LayerStatistics",
    "hessian_diagonal",
    "trainable_parameters",
]
