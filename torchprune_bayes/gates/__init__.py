"""Noise gates on units, channels and heads: learning which of them a network needs."""

from torchprune_bayes.gates.attach import attach_gates, gates_of
from torchprune_bayes.gates.collection import Gates
from torchprune_bayes.gates.criteria import (
    DEFAULT_TAU,
    BMRSNormal,
    BMRSUniform,
    Criterion,
    PosteriorMean,
    SignalToNoise,
    WeightNorm,
    choose_closed,
    find_criterion,
)
from torchprune_bayes.gates.fold import fold_gates
from torchprune_bayes.gates.noise_gate import NoiseGate
from torchprune_bayes.gates.sites import Site, find_sites

__all__ = [
    "DEFAULT_TAU",
    "BMRSNormal",
    "BMRSUniform",
    "Criterion",
    "Gates",
    "NoiseGate",
    "PosteriorMean",
    "SignalToNoise",
    "Site",
    "WeightNorm",
    "attach_gates",
    "choose_closed",
    "find_criterion",
    "find_sites",
    "fold_gates",
    "gates_of",
]
