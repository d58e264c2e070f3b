"""Statistics fitted to gradients: see :class:`EmpiricalFisher`."""

from torchprune_bayes.curvature.empirical_fisher import EmpiricalFisher

__all__ = ["EmpiricalFisher"]
