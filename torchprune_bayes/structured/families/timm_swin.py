"""Swin Transformer of timm: each head also owns a column of the relative position bias table."""

from __future__ import annotations

from torch import nn

from torchprune_bayes.errors import ParameterError
from torchprune_bayes.structured.families._blocks import (
    heads,
    join,
    member,
    projection,
    size,
    spans,
)
from torchprune_bayes.structured.families.timm_vit import mlp
from torchprune_bayes.structured.groups import AttributeRule, UnitGroup, UnitSlice


def groups_of_block(block: nn.Module, name: str) -> list[UnitGroup]:
    """List the heads and the hidden units of a ``timm`` ``SwinTransformerBlock``.

    Args:
        block: The block.
        name: Its qualified name in the model.

    Returns:
        Two groups: heads, hidden units.

    Raises:
        ParameterError: If the block is built of other layers.
    """
    return [_heads(block, name), mlp(block, name)]


def _heads(block: nn.Module, name: str) -> UnitGroup:
    attention = member(block, name, "attn", "timm.models.swin_transformer.WindowAttention")
    path = join(name, "attn")
    units = size(attention, path, "num_heads")
    qkv, output = projection(block, name, "attn.qkv"), projection(block, name, "attn.proj")
    table = attention._parameters.get("relative_position_bias_table")
    if table is None or table.dim() != 2 or table.shape[1] != units:
        result = "nothing" if table is None else str(tuple(table.shape))
        raise ParameterError(
            f"Expected `{path}.relative_position_bias_table` with one column for each of {units} "
            f"heads, got {result}."
        )
    biases = UnitSlice(f"{path}.relative_position_bias_table", 1, spans(units, 1), "producer")
    return heads(
        [qkv],
        output,
        units,
        output.inputs // units,
        copies=3,
        extra=[biases],
        attributes=[AttributeRule(path, "num_heads")],
    )
