"""Noise gates on units, channels and heads: learning which of them a network needs.

In plain words: a gate multiplies a unit by a random θ, whose noise is learnt with the weights.
Where the data do not need a unit, its noise grows until the posterior of θ is the prior, and the
evidence says that the unit can go (Wright, Igel and Selvan 2024, arXiv:2406.01345).

1. :func:`attach_gates` puts gates into a model without touching its source; ``preserve=True``
   leaves what a pretrained model computes.
2. :class:`~torchprune_bayes.training.GateTraining` trains them in any loop and closes them.
3. :func:`fold_gates` moves them into the weights, and
   :func:`~torchprune_bayes.structured.shrink` with ``target="evidence"`` cuts out what is closed.

A :class:`Criterion` decides which gates close: :class:`BMRSNormal` (the default) and
:class:`BMRSUniform` compare the evidence of the model with and without a unit, and need neither a
threshold nor an amount. :class:`SignalToNoise`, :class:`PosteriorMean` and :class:`WeightNorm` are
baselines with one. Both forms of BMRS tolerate evidence of ``tau`` against closing a gate, by
default :data:`DEFAULT_TAU`, ½ log 2π: a gate that the network does not need tends to a change of
the log evidence of zero *from below*, so that the exact rule, ``tau=0``, hardly ever fires.

Example:
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    >>> gates = attach_gates(model)
    >>> with torch.no_grad():  # as training would leave them if unit 1 were not needed
    ...     _ = gates["2:in"].log_sigma.copy_(torch.tensor([-5.0, 4.0, -5.0]))
    >>> gates.prune("bmrs-n")
    1
    >>> fold_gates(model)
    {'2:in': tensor([ True, False,  True])}
    >>> int(model[2].weight[:, 1].count_nonzero())
    0
"""

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
from torchprune_bayes.gates.site import Site
from torchprune_bayes.gates.sites import find_sites

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
