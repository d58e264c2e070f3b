"""The size attributes of layers, derived from their tensors.

In plain words: after a cut, ``nn.Linear.out_features`` and the like must agree with the weight.
Some are only printed, others affect the forward pass (``groups``, ``num_groups``, ``nf``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from torchprune_bayes.errors import ParameterError
from torchprune_bayes.layer_kinds import kind_of

Sizes: TypeAlias = dict[str, Any]


def layer_sizes(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sizes:
    """Return the size attributes that a module should have, given its own tensors after a cut.

    Args:
        name: Qualified name of the module, for messages.
        module: The module, still with its old tensors and attributes.
        tensors: Its own parameters and buffers after the cut, by local name.

    Returns:
        Attribute values; empty for a module without size attributes.

    Raises:
        ParameterError: If the layer packs several matrices into one tensor, or its tensors do not
            fit its number of groups any more.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 3)
        >>> layer_sizes("fc", layer, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})
        {'out_features': 2, 'in_features': 4}
    """
    kind = kind_of(module)
    if kind.packs_matrices:
        raise ParameterError(
            f"Expected a layer with one matrix per tensor, got `{name}` of {type(module).__name__},"
            " whose units cannot be cut."
        )
    return kind.sizes(name, module, tensors)
