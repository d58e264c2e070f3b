"""BERT and RoBERTa of Hugging Face: self attention of encoders, ``intermediate`` and ``output``."""

from __future__ import annotations

from torch import nn

from torchprune_bayes.structured.families._blocks import (
    class_path,
    heads,
    hidden,
    join,
    member,
    projection,
    refuse,
    size,
)
from torchprune_bayes.structured.groups import AttributeRule, UnitGroup


def groups_of_block(block: nn.Module, name: str) -> list[UnitGroup]:
    """List the heads and the hidden units of a ``BertLayer`` or ``RobertaLayer``.

    Args:
        block: The block, whose class tells the classes of its parts.
        name: Its qualified name in the model.

    Returns:
        Two groups: heads, hidden units.

    Raises:
        ParameterError: If the block has cross attention or other layers.
    """
    refuse(block, name, "crossattention", "heads of cross attention are not supported")
    stem = class_path(block).removesuffix("Layer")
    attention = member(block, name, "attention.self", f"{stem}SelfAttention")
    path = join(name, "attention.self")
    width = size(attention, path, "attention_head_size")
    rules = [
        AttributeRule(path, "num_attention_heads"),
        AttributeRule(path, "all_head_size", width),
    ]
    member(block, name, "intermediate", f"{stem}Intermediate")
    member(block, name, "output", f"{stem}Output")
    return [
        heads(
            [
                projection(block, name, f"attention.self.{part}")
                for part in ("query", "key", "value")
            ],
            projection(block, name, "attention.output.dense"),
            size(attention, path, "num_attention_heads"),
            width,
            attributes=rules,
        ),
        hidden(
            [projection(block, name, "intermediate.dense")], projection(block, name, "output.dense")
        ),
    ]
