"""ViT and DeiT of timm: heads of the fused ``attn.qkv``, hidden units of ``mlp``.

The scale of the scores depends on the size of a head, which is unchanged, so that a model with
whole heads removed equals the dense one with these heads zeroed.
"""

from __future__ import annotations

from torch import nn

from torchprune_bayes.structured.families._blocks import (
    group,
    hidden,
    join,
    member,
    projection,
    refuse,
    size,
    spans,
)
from torchprune_bayes.structured.groups import AttributeRule, UnitGroup


def groups_of_block(block: nn.Module, name: str) -> list[UnitGroup]:
    """List the heads and the hidden units of a ``timm.models.vision_transformer.Block``.

    Args:
        block: The block.
        name: Its qualified name in the model.

    Returns:
        Two groups: heads, hidden units.

    Raises:
        ParameterError: If the block has a norm across heads or hidden units, or other layers.
    """
    return [_heads(block, name), mlp(block, name)]


def mlp(block: nn.Module, name: str) -> UnitGroup:
    """List the hidden units of a ``timm.layers.mlp.Mlp`` at ``block.mlp``.

    Raises:
        ParameterError: If the MLP is another one or normalises its hidden units.
    """
    member(block, name, "mlp", "timm.layers.mlp.Mlp")
    refuse(block, name, "mlp.norm", "its statistics run over all hidden units")
    return hidden([projection(block, name, "mlp.fc1")], projection(block, name, "mlp.fc2"))


def _heads(block: nn.Module, name: str) -> UnitGroup:
    attention = member(block, name, "attn", "timm.layers.attention.Attention")
    refuse(block, name, "attn.norm", "its statistics run over all heads")
    path = join(name, "attn")
    units, width = size(attention, path, "num_heads"), size(attention, path, "head_dim")
    size(attention, path, "attn_dim")
    makers = [(projection(block, name, "attn.qkv"), spans(units, width, copies=3))]
    if getattr(attention, "gate", None) is not None:
        makers.append((projection(block, name, "attn.gate"), spans(units, width)))
    return group(
        join(name, "attn.qkv"),
        "head",
        units,
        makers,
        (projection(block, name, "attn.proj"), spans(units, width)),
        attributes=(AttributeRule(path, "num_heads"), AttributeRule(path, "attn_dim", width)),
    )
