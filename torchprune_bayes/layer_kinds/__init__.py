"""Kinds of layers: what the library knows about linear layers, convolutions, norms and the like.

Which tensors are pruned, which dimension is over inputs, what a weight costs, which sizes a layer
notes down, where a gate fits, and how gradients of single samples follow from one pass: each is
said in the one class of a kind, and asked of :func:`kind_of`.
"""

from torchprune_bayes.layer_kinds.convolution import is_depthwise
from torchprune_bayes.layer_kinds.gradients import SampleGradients
from torchprune_bayes.layer_kinds.kind import LayerKind, Side
from torchprune_bayes.layer_kinds.table import (
    kind_of,
    register_kind,
    registered_kinds,
    unregister_kind,
)

__all__ = [
    "LayerKind",
    "SampleGradients",
    "Side",
    "is_depthwise",
    "kind_of",
    "register_kind",
    "registered_kinds",
    "unregister_kind",
]
