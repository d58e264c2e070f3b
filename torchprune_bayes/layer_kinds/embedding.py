"""Tables of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchprune_bayes.layer_kinds.gradients import SampleGradients
from torchprune_bayes.layer_kinds.kind import LayerKind


class EmbeddingRows(SampleGradients):
    """Gradients of a table: ``Σ_t e(i_nt) g_ntᵀ``, zero in all rows that a sample does not look up.

    Args:
        indices: ``i``, ``[B, T]``; negative ones are left out.
        gradients: ``g``, ``[B, T, k]``.
        shape: Shape of the table.
    """

    def __init__(self, indices: Tensor, gradients: Tensor, shape: Sequence[int]) -> None:
        super().__init__(indices.shape[0], shape)
        self.indices = indices
        self.gradients = gradients

    def add_squares(self, total: Tensor, *, by_position: bool = False) -> None:
        """Add the sum of the squares."""
        seen = self.indices >= 0
        if by_position:
            total.index_add_(0, self.indices[seen], self.gradients[seen].to(total).square_())
            return
        sample = torch.arange(self.samples, device=seen.device).unsqueeze(1)
        keys = (sample * self.shape[0] + self.indices)[seen]
        unique, places = keys.unique(return_inverse=True)
        sums = total.new_zeros(len(unique), self.shape[1])
        sums.index_add_(0, places, self.gradients[seen].to(total))
        total.index_add_(0, unique % self.shape[0], sums.square_())

    def write_to(self, rows: Tensor, *, add: bool) -> None:
        """Write or add them."""
        if not add:
            rows.zero_()
        for sample, row in enumerate(rows):
            seen = self.indices[sample] >= 0
            row.index_add_(0, self.indices[sample, seen], self.gradients[sample, seen].to(rows))

    def multiplied_out(self, sample: int, rows: slice, like: Tensor) -> Tensor:
        """Some rows of the gradient of one sample."""
        start, stop, _ = rows.indices(self.shape[0])
        indices = self.indices[sample]
        seen = (indices >= start) & (indices < stop)
        table = torch.zeros(stop - start, self.shape[1], dtype=like.dtype, device=like.device)
        return table.index_add_(0, indices[seen] - start, self.gradients[sample, seen].to(like))

    def joined(self, others: Sequence[EmbeddingRows]) -> EmbeddingRows:
        """The gradients that are sums over several uses."""
        uses = (self, *others)
        indices = torch.cat([use.indices for use in uses], dim=1)
        gradients = torch.cat([use.gradients for use in uses], dim=1)
        return EmbeddingRows(indices, gradients, self.shape)


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
