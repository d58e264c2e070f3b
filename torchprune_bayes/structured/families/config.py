"""Writing the new sizes into a Hugging Face config, if it can represent them.

In plain words: after shrinking, ``from_pretrained`` builds the model from its config, so it works
only if that config describes every block. It can do so when all blocks have the same number of
heads and hidden units, and, where the size of a head is computed from the number of heads, when no
head, or dimension inside of heads, was removed. In all other cases the config is not changed; see
``save_shrunk``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured.families import family_of
from torchprune_bayes.structured.groups import UnitGroup

Edits: TypeAlias = dict[str, int]


def fit_config(model: nn.Module) -> Edits:
    """Set the config of a shrunk Hugging Face model so that ``from_pretrained`` rebuilds it.

    Args:
        model: A model of a known family with a ``config``; only the config is changed.

    Returns:
        The entries that were set; none if the config cannot describe the model.

    Raises:
        ArgumentTypeError: If the model has no config or is of no Hugging Face family.
        ParameterError: If a block is not built as expected.
    """
    inner = unwrap(model)
    config, family = getattr(inner, "config", None), family_of(inner)
    if config is None or family is None or family.name not in _EDITS:
        raise ArgumentTypeError(
            f"Expected a model of {', '.join(_EDITS)} with a config, got {type(inner).__name__}."
        )
    groups = family.groups(inner)
    heads = {group.units for group in groups if group.kind == "head"}
    hidden = {group.units for group in groups if group.kind == "hidden"}
    if len(heads) != 1 or len(hidden) != 1:
        return {}
    sizes = {_size_of_heads(group, config) for group in groups if group.kind == "head"}
    if len(sizes) != 1:
        return {}
    edits = _EDITS[family.name](config, heads.pop(), hidden.pop(), sizes.pop())
    for name, value in edits.items():
        setattr(config, name, value)
    return edits


def _size_of_heads(group: UnitGroup, config: Any) -> int:
    """Dimensions of a head's values."""
    shared = config.num_attention_heads // _key_value_heads(config)
    read = next(piece for piece in group.slices if piece.role == "consumer")
    return int(read.positions.shape[1] // shared)


def _key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _hidden_only(entry: str) -> Callable[[Any, int, int, int], Edits]:
    def edits(config: Any, heads: int, hidden: int, size: int) -> Edits:
        whole = heads == config.num_attention_heads and heads * size == config.hidden_size
        return {entry: hidden} if whole else {}

    return edits


def _vit(config: Any, heads: int, hidden: int, size: int) -> Edits:
    return {"num_attention_heads": heads, "head_dim": size, "intermediate_size": hidden}


def _llama(config: Any, heads: int, hidden: int, size: int) -> Edits:
    return {
        "num_attention_heads": heads * (config.num_attention_heads // _key_value_heads(config)),
        "num_key_value_heads": heads,
        "head_dim": size,
        "intermediate_size": hidden,
    }


_EDITS: dict[str, Callable[[Any, int, int, int], Edits]] = {
    "GPT-2": _hidden_only("n_inner"),
    "DistilBERT": _hidden_only("hidden_dim"),
    "BERT": _hidden_only("intermediate_size"),
    "RoBERTa": _hidden_only("intermediate_size"),
    "ViT": _vit,
    "Llama": _llama,
    "Mistral": _llama,
    "Qwen2": _llama,
    "Qwen3": _llama,
}
