"""Transformers that are supported without tracing: their heads and hidden units are written down.

In plain words: tracing cannot see where one head ends and the next begins, which rows correspond in
a fused projection, or which numbers on a module must change. For the families listed here this is
known, so a :class:`Family` derives it from the blocks. The residual stream is not pruned, because
the norms on it compute their statistics over all of its entries.

Modules are recognised by the full name of their class, so that neither timm nor transformers is
imported. Supported are: timm's ViT, DeiT and Swin; Hugging Face's GPT-2, DistilBERT, BERT, RoBERTa,
ViT, and Llama, Mistral, Qwen2 and Qwen3 (multi-head and grouped-query attention), whichever head
sits on top of them.

Example:
    >>> family_of(nn.Linear(2, 2)) is None
    True
    >>> [family.name for family in FAMILIES]
    ['ViT (timm)', 'Swin (timm)', 'GPT-2', 'DistilBERT', 'BERT', 'RoBERTa', 'ViT', 'Llama',
     'Mistral', 'Qwen2', 'Qwen3']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from torchprune_bayes.errors import ParameterError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured.families import (
    bert,
    distilbert,
    gpt2,
    hf_vit,
    llama,
    timm_swin,
    timm_vit,
)
from torchprune_bayes.structured.families._blocks import class_path
from torchprune_bayes.structured.groups import UnitGroup

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """An architecture whose blocks are known.

    Attributes:
        name: Its name for users.
        models: Class paths of the modules that hold the blocks.
        block: Class path of a block.
        groups_of_block: Lists the groups of one block, given its qualified name.
    """

    name: str
    models: tuple[str, ...]
    block: str
    groups_of_block: Callable[[nn.Module, str], list[UnitGroup]]

    def groups(self, model: nn.Module) -> list[UnitGroup]:
        """List the heads and hidden units of all blocks, in the order of the modules.

        Args:
            model: The model; nothing in it is changed.

        Returns:
            Two groups for each block.

        Raises:
            ParameterError: If there is no block, or one is not built as expected.
        """
        result = [
            unit_group
            for name, module in unwrap(model).named_modules()
            if class_path(module) == self.block
            for unit_group in self.groups_of_block(module, name)
        ]
        if not result:
            raise ParameterError(
                f"Expected a model of the family {self.name} to hold blocks of class {self.block}, "
                "got none: this variant is not supported."
            )
        return result


def _transformers(
    name: str,
    stem: str,
    block: str,
    groups_of_block: Callable[[nn.Module, str], list[UnitGroup]],
) -> Family:
    """Describe a family of Hugging Face, whose classes start with ``stem``."""
    module = f"transformers.models.{stem.lower()}.modeling_{stem.lower()}"
    return Family(name, (f"{module}.{stem}Model",), f"{module}.{block}", groups_of_block)


FAMILIES = (
    Family(
        "ViT (timm)",
        (
            "timm.models.vision_transformer.VisionTransformer",
            "timm.models.deit.VisionTransformerDistilled",
        ),
        "timm.models.vision_transformer.Block",
        timm_vit.groups_of_block,
    ),
    Family(
        "Swin (timm)",
        ("timm.models.swin_transformer.SwinTransformer",),
        "timm.models.swin_transformer.SwinTransformerBlock",
        timm_swin.groups_of_block,
    ),
    _transformers("GPT-2", "GPT2", "GPT2Block", gpt2.groups_of_block),
    _transformers("DistilBERT", "DistilBert", "TransformerBlock", distilbert.groups_of_block),
    _transformers("BERT", "Bert", "BertLayer", bert.groups_of_block),
    _transformers("RoBERTa", "Roberta", "RobertaLayer", bert.groups_of_block),
    _transformers("ViT", "ViT", "ViTLayer", hf_vit.groups_of_block),
    _transformers("Llama", "Llama", "LlamaDecoderLayer", llama.groups_of_block),
    _transformers("Mistral", "Mistral", "MistralDecoderLayer", llama.groups_of_block),
    _transformers("Qwen2", "Qwen2", "Qwen2DecoderLayer", llama.groups_of_block),
    _transformers("Qwen3", "Qwen3", "Qwen3DecoderLayer", llama.groups_of_block),
)
"""The architectures that are supported, in the order in which they are looked for."""


def family_of(model: nn.Module) -> Family | None:
    """Return the family of a model.

    Args:
        model: Any module; wrappers are looked through.

    Returns:
        The family, or ``None`` for a model without any of the known blocks, which has to be traced.

    Raises:
        ParameterError: If the model mixes several families.
    """
    paths = {class_path(module) for module in unwrap(model).modules()}
    matches = [family for family in FAMILIES if paths & {family.block, *family.models}]
    if len(matches) > 1:
        names = ", ".join(family.name for family in matches)
        raise ParameterError(f"Expected a model of one family, got blocks of several: {names}.")
    return matches[0] if matches else None
