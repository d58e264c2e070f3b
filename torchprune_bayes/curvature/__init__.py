"""Statistics fitted to gradients, or to second derivatives, of the calibration loss."""

from torchprune_bayes.curvature.diagonal_fisher import EmpiricalFisherDiagonal
from torchprune_bayes.curvature.empirical_fisher import EmpiricalFisher
from torchprune_bayes.curvature.hessian import hessian_diagonal
from torchprune_bayes.curvature.kfac import KroneckerFactors

__all__ = ["EmpiricalFisher", "EmpiricalFisherDiagonal", "KroneckerFactors", "hessian_diagonal"]
