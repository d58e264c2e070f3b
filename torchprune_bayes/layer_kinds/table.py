"""The table of layer kinds: whoever wants to know something about a layer asks here."""

from __future__ import annotations

from torch import nn

from torchprune_bayes.layer_kinds.activation import PReLUKind
from torchprune_bayes.layer_kinds.attention import MultiheadAttentionKind, UncalledLinearKind
from torchprune_bayes.layer_kinds.convolution import ConvolutionKind, TransposedConvolutionKind
from torchprune_bayes.layer_kinds.embedding import EmbeddingKind
from torchprune_bayes.layer_kinds.kind import LayerKind, OtherKind
from torchprune_bayes.layer_kinds.linear import HuggingFaceConv1DKind, LinearKind
from torchprune_bayes.layer_kinds.normalization import (
    BatchNormKind,
    GroupNormKind,
    LayerNormKind,
    RMSNormKind,
)
from torchprune_bayes.layer_kinds.recurrent import BilinearKind, RecurrentKind

_KINDS: list[LayerKind] = [
    UncalledLinearKind(),
    LinearKind(),
    HuggingFaceConv1DKind(),
    TransposedConvolutionKind(),
    ConvolutionKind(),
    MultiheadAttentionKind(),
    RecurrentKind(),
    BilinearKind(),
    EmbeddingKind(),
    LayerNormKind(),
    RMSNormKind(),
    BatchNormKind(),
    GroupNormKind(),
    PReLUKind(),
]
_OTHER = OtherKind()


def kind_of(module: nn.Module) -> LayerKind:
    """The first kind in the table that a module is of; one that knows nothing if there is none.

    Example:
        >>> type(kind_of(nn.Conv1d(2, 4, 3))).__name__, kind_of(nn.Linear(2, 3)).input_dim
        ('ConvolutionKind', 1)
        >>> kind_of(nn.ReLU()).prunable
        ()
    """
    return next((kind for kind in _KINDS if kind.matches(module)), _OTHER)


def register_kind(kind: LayerKind) -> LayerKind:
    """Put a kind in front of the table, so that it is asked before the others.

    Pruning lists, patterns, costs, gates, curvature and cutting know the layer from then on.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(3))
        ...
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> class ScaleKind(LayerKind):
        ...     prunable = ("weight",)
        ...
        ...     def matches(self, module):
        ...         return isinstance(module, Scale)
        >>> import torch
        >>> kind = register_kind(ScaleKind())
        >>> kind_of(Scale()).prunable
        ('weight',)
        >>> unregister_kind(kind)
    """
    _KINDS.insert(0, kind)
    return kind


def unregister_kind(kind: LayerKind) -> None:
    """Take a kind that was registered out of the table."""
    _KINDS.remove(kind)


def registered_kinds() -> tuple[LayerKind, ...]:
    """All kinds, in the order in which they are asked."""
    return tuple(_KINDS)
