"""GPT-2 of Hugging Face: ``Conv1D`` keeps its outputs along the columns, ``c_attn`` is fused."""

from __future__ import annotations

from torch import nn

from torchprune_bayes.structured.families._blocks import (
    heads,
    hidden,
    join,
    member,
    projection,
    refuse,
    size,
)
from torchprune_bayes.structured.groups import AttributeRule, UnitGroup

_PACKAGE = "transformers.models.gpt2.modeling_gpt2"


def groups_of_block(block: nn.Module, name: str) -> list[UnitGroup]:
    """List the heads and the hidden units of a ``GPT2Block``.

    Args:
        block: The block.
        name: Its qualified name in the model.

    Returns:
        Two groups: heads, hidden units.

    Raises:
        ParameterError: If the block has cross attention or other layers.
    """
    refuse(block, name, "crossattention", "heads of cross attention are not supported")
    attention = member(block, name, "attn", f"{_PACKAGE}.GPT2Attention")
    path = join(name, "attn")
    width = size(attention, path, "head_dim")
    size(attention, path, "split_size")
    rules = [AttributeRule(path, "num_heads"), AttributeRule(path, "split_size", width)]
    member(block, name, "mlp", f"{_PACKAGE}.GPT2MLP")
    return [
        heads(
            [projection(block, name, "attn.c_attn")],
            projection(block, name, "attn.c_proj"),
            size(attention, path, "num_heads"),
            width,
            copies=3,
            attributes=rules,
        ),
        hidden([projection(block, name, "mlp.c_fc")], projection(block, name, "mlp.c_proj")),
    ]
