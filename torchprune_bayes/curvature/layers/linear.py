"""Linear layers, on vectors or on sequences of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchprune_bayes.curvature.layers.gradients import (
    DenseGradients,
    OuterProducts,
    SampleGradients,
)
from torchprune_bayes.curvature.layers.rule import LayerRule
from torchprune_bayes.params import is_hf_conv1d


class LinearRule(LayerRule):
    """``nn.Linear``: ``g aᵀ``, summed over all dimensions between the first and the last."""

    has_factors = True

    def applies_to(self, module: nn.Module) -> bool:
        """Whether this is such a layer."""
        return isinstance(module, nn.Linear)

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerRule.gradients`."""
        outputs, inputs = _columns(g, samples), _columns(saved, samples)
        entries = inputs[0].numel()
        shape = (outputs.shape[2], inputs.shape[2])
        weight = OuterProducts(outputs, inputs.__getitem__, entries, shape)
        return {"weight": weight, "bias": DenseGradients(outputs.sum((1, 3)))}


class HuggingFaceConv1DRule(LayerRule):
    """Hugging Face's ``Conv1D``, a linear layer with its weight transposed: ``a gᵀ``."""

    has_factors = True

    def applies_to(self, module: nn.Module) -> bool:
        """Whether this is such a layer."""
        return is_hf_conv1d(module)

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerRule.gradients`."""
        outputs, inputs = _columns(g, samples), _columns(saved, samples)
        entries = outputs[0].numel()
        shape = (inputs.shape[2], outputs.shape[2])
        weight = OuterProducts(inputs, outputs.__getitem__, entries, shape, inputs_left=True)
        return {"weight": weight, "bias": DenseGradients(outputs.sum((1, 3)))}


def _columns(values: Tensor, samples: int) -> Tensor:
    """``[B, ..., k]`` as ``[B, 1, k, T]``."""
    return values.reshape(samples, 1, -1, values.shape[-1]).mT
