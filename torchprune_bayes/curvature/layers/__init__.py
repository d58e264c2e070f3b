"""Layers whose gradients per sample follow from one pass over a batch, one file per kind."""

from __future__ import annotations

from torch import nn

from torchprune_bayes.curvature.layers.convolution import ConvolutionRule
from torchprune_bayes.curvature.layers.embedding import EmbeddingRule
from torchprune_bayes.curvature.layers.linear import HuggingFaceConv1DRule, LinearRule
from torchprune_bayes.curvature.layers.normalization import (
    BatchNormRule,
    GroupNormRule,
    LayerNormRule,
    RMSNormRule,
)
from torchprune_bayes.curvature.layers.rule import LayerRule

LAYER_RULES: tuple[LayerRule, ...] = (
    LinearRule(),
    HuggingFaceConv1DRule(),
    ConvolutionRule(),
    EmbeddingRule(),
    LayerNormRule(),
    RMSNormRule(),
    BatchNormRule(),
    GroupNormRule(),
)
"""The first one that applies to a layer is taken."""


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule for a layer, or ``None`` if there is none for its kind.

    Example:
        >>> type(rule_for(nn.Conv1d(2, 4, 3))).__name__, rule_for(nn.Bilinear(2, 2, 2))
        ('ConvolutionRule', None)
    """
    return next((rule for rule in LAYER_RULES if rule.applies_to(module)), None)


__all__ = ["LAYER_RULES", "LayerRule", "rule_for"]
