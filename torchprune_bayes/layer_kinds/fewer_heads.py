"""``nn.MultiheadAttention`` with fewer heads than its width has room for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class FewerHeads(nn.MultiheadAttention):
    """What ``nn.MultiheadAttention`` becomes when heads are cut out of it.

    PyTorch's own works out the width of a head from the width of its input and the number of heads,
    so that it cannot have fewer of the same width. This one reads it off the projections. It is
    made of a module that exists, by exchanging its class; calls, masks and results are those of
    ``nn.MultiheadAttention``, and weights that it returns are those of the heads that remain.

    Example:
        >>> import torch
        >>> attention = nn.MultiheadAttention(8, 4)  # heads of width 2
        >>> attention.in_proj_weight = nn.Parameter(attention.in_proj_weight[:12])
        >>> attention.in_proj_bias = nn.Parameter(attention.in_proj_bias[:12])
        >>> attention.out_proj.weight = nn.Parameter(attention.out_proj.weight[:, :4])
        >>> attention.num_heads = 2
        >>> attention.__class__ = FewerHeads
        >>> x = torch.ones(5, 1, 8)
        >>> [tuple(each.shape) for each in attention(x, x, x, average_attn_weights=False)]
        [(5, 1, 8), (1, 2, 5, 5)]
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, which keeps callers off fused paths that take the width of heads for granted."""
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``nn.MultiheadAttention.forward``, which documents the arguments."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Expected `attn_mask` with `is_causal`, which is only a hint.")
        batched = query.dim() == 3
        places: tuple[Tensor, ...] = (query, key, value)
        if not batched:
            places = tuple(each.unsqueeze(0) for each in places)
        elif not self.batch_first:
            places = tuple(each.transpose(0, 1) for each in places)
        q, k, v = self._projected(*places)
        mask = _masked(query, attn_mask, key_padding_mask, batched, self.num_heads)
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, self.dropout, self.training)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            weights = None
            dropout = self.dropout if self.training else 0.0
            attended = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        joined = attended.transpose(1, 2).flatten(2)
        output = functional.linear(joined, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values ``[batch, heads, tokens, width]``."""
        weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            functional.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        ]


def _masked(
    query: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batched: bool,
    heads: int,
) -> Tensor | None:
    """Both masks as one additive mask, broadcastable to ``[batch, heads, queries, keys]``."""
    additive: Tensor | None = None
    if attn_mask is not None:
        additive = _additive(attn_mask, query)
        if attn_mask.dim() == 3:  # [batch * heads, queries, keys]
            additive = additive.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask if batched else key_padding_mask[None], query)
        padding = padding[:, None, None, :]
        additive = padding if additive is None else additive + padding
    return additive


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != like.dtype and not mask.is_floating_point():
        return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
    return mask
