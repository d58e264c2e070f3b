"""ViT of Hugging Face: ``attention.{q,k,v,o}_proj`` and ``mlp.fc1``, ``mlp.fc2``."""

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

_PACKAGE = "transformers.models.vit.modeling_vit"


def groups_of_block(block: nn.Module, name: str) -> list[UnitGroup]:
    """List the heads and the hidden units of a ``ViTLayer``.

    Args:
        block: The block.
        name: Its qualified name in the model.

    Returns:
        Two groups: heads, hidden units.

    Raises:
        ParameterError: If the block is built of other layers.
    """
    attention = member(block, name, "attention", f"{_PACKAGE}.ViTAttention")
    path = join(name, "attention")
    member(block, name, "mlp", f"{_PACKAGE}.ViTMLP")
    return [
        heads(
            [projection(block, name, f"attention.{part}_proj") for part in "qkv"],
            projection(block, name, "attention.o_proj"),
            size(attention, path, "num_attention_heads"),
            size(attention, path, "head_dim"),
            attributes=[AttributeRule(path, "num_attention_heads")],
        ),
        hidden([projection(block, name, "mlp.fc1")], projection(block, name, "mlp.fc2")),
    ]
