"""Llama, Mistral, Qwen2 and Qwen3: a unit is a key/value head with the query heads that read it.

With grouped-query attention, query heads ``g * u, ..., g * u + g - 1`` share key/value head ``u``.
Removing them together keeps the group size ``g`` and with it the wiring of all the others; with
plain multi-head attention ``g`` is one. Rotary embeddings and the norms of queries and keys act
within a head and are kept.
"""

from __future__ import annotations

from torch import nn

from torchprune_bayes.structured.families._blocks import (
    class_path,
    group,
    hidden,
    join,
    member,
    projection,
    size,
    spans,
)
from torchprune_bayes.structured.groups import AttributeRule, UnitGroup


def groups_of_block(block: nn.Module, name: str) -> list[UnitGroup]:
    """List the key/value groups and the gated hidden units of a decoder layer.

    Args:
        block: The block, whose class tells the classes of its parts.
        name: Its qualified name in the model.

    Returns:
        Two groups: key/value heads with their query heads, hidden units.

    Raises:
        ParameterError: If the block is built of other layers.
    """
    stem = class_path(block).removesuffix("DecoderLayer")
    member(block, name, "mlp", f"{stem}MLP")
    gated = hidden(
        [projection(block, name, f"mlp.{part}_proj") for part in ("gate", "up")],
        projection(block, name, "mlp.down_proj"),
        [AttributeRule(join(name, "mlp"), "intermediate_size")],
    )
    return [_heads(block, name, stem), gated]


def _heads(block: nn.Module, name: str, stem: str) -> UnitGroup:
    attention = member(block, name, "self_attn", f"{stem}Attention")
    path = join(name, "self_attn")
    width, shared = size(attention, path, "head_dim"), size(attention, path, "num_key_value_groups")
    query, key, value, output = (
        projection(block, name, f"self_attn.{part}_proj") for part in "qkvo"
    )
    units = max(key.outputs // width, 1)
    own, queries = spans(units, width), spans(units, shared * width)
    makers = [(query, queries), (key, own), (value, own)]
    return group(value.name, "head", units, makers, (output, queries))
