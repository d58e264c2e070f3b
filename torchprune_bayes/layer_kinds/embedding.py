"""Tables of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from torchprune_bayes.layer_kinds.gradients import EmbeddingRows, SampleGradients
from torchprune_bayes.layer_kinds.kind import LayerKind


class EmbeddingKind(LayerKind):
    """``nn.Embedding``; the row of ``padding_idx`` has no gradient."""

    input_dim = 0
    output_dim = 1
    units_dim = -1
    is_table = True
    names = ("weight",)

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, nn.Embedding)

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``num_embeddings`` and ``embedding_dim``."""
        rows, columns = tensors["weight"].shape
        return {"num_embeddings": rows, "embedding_dim": columns}

    def has_gradients(self, module: nn.Module) -> bool:
        """Unless rows are rescaled on the way, or their gradients are."""
        table = cast("nn.Embedding", module)
        return table.max_norm is None and not table.scale_grad_by_freq

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerKind.gradients`."""
        layer = cast("nn.Embedding", module)
        indices = saved.reshape(samples, -1)
        if layer.padding_idx is not None:
            indices = indices.masked_fill(indices == layer.padding_idx, -1)
        rows = g.reshape(samples, -1, g.shape[-1])
        return {"weight": EmbeddingRows(indices, rows, layer.weight.shape)}
