"""DistilBERT of Hugging Face: three projections side by side, ``ffn.lin1`` and ``ffn.lin2``."""

from __future__ import annotations

from torch import nn

from torchprune_bayes.structured.families._blocks import (
    heads,
    hidden,
    join,
    member,
    projection,
    size,
)
from torchprune_bayes.structured.groups import AttributeRule, UnitGroup

_PACKAGE = "transformers.models.distilbert.modeling_distilbert"


def groups_of_block(block: nn.Module, name: str) -> list[UnitGroup]:
    """List the heads and the hidden units of a DistilBERT ``TransformerBlock``.

    Args:
        block: The block.
        name: Its qualified name in the model.

    Returns:
        Two groups: heads, hidden units.

    Raises:
        ParameterError: If the block is built of other layers.
    """
    attention = member(block, name, "attention", f"{_PACKAGE}.DistilBertSelfAttention")
    path = join(name, "attention")
    width = size(attention, path, "attention_head_size")
    member(block, name, "ffn", f"{_PACKAGE}.FFN")
    return [
        heads(
            [projection(block, name, f"attention.{part}_lin") for part in "qkv"],
            projection(block, name, "attention.out_lin"),
            size(attention, path, "n_heads"),
            width,
            attributes=[AttributeRule(path, "n_heads"), AttributeRule(path, "dim", width)],
        ),
        hidden([projection(block, name, "ffn.lin1")], projection(block, name, "ffn.lin2")),
    ]
