"""Tables of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from torchprune_bayes.curvature.layers.gradients import EmbeddingRows, SampleGradients
from torchprune_bayes.curvature.layers.rule import LayerRule


class EmbeddingRule(LayerRule):
    """``nn.Embedding``; the row of ``padding_idx`` has no gradient."""

    names = ("weight",)

    def applies_to(self, module: nn.Module) -> bool:
        """Whether this is such a layer."""
        plain = isinstance(module, nn.Embedding)
        return plain and module.max_norm is None and not module.scale_grad_by_freq

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerRule.gradients`."""
        layer = cast("nn.Embedding", module)
        indices = saved.reshape(samples, -1)
        if layer.padding_idx is not None:
            indices = indices.masked_fill(indices == layer.padding_idx, -1)
        rows = g.reshape(samples, -1, g.shape[-1])
        return {"weight": EmbeddingRows(indices, rows, layer.weight.shape)}
