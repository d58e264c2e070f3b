"""Laplace approximations: prior structures, marginal likelihood, posterior precisions."""

from torchprune_bayes.laplace.evidence import maximise_evidence
from torchprune_bayes.laplace.fitting import LaplaceOptions, fit_posterior, posterior_of
from torchprune_bayes.laplace.from_laplace import posterior_from_laplace
from torchprune_bayes.laplace.joint_posterior import JointPosterior
from torchprune_bayes.laplace.posterior import Posterior
from torchprune_bayes.laplace.priors import PriorPrecision, PriorStructure

__all__ = [
    "JointPosterior",
    "LaplaceOptions",
    "Posterior",
    "PriorPrecision",
    "PriorStructure",
    "fit_posterior",
    "maximise_evidence",
    "posterior_from_laplace",
    "posterior_of",
]
