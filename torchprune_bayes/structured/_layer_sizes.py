"""The sizes that layers note down about themselves, read off their tensors.

In plain words: after a cut, ``nn.Linear.out_features`` and the like must say what the weight says.
Some are only printed, others steer the forward pass (``groups``, ``num_groups``, ``nf``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from torchprune_bayes.errors import ParameterError
from torchprune_bayes.params import is_hf_conv1d

Sizes: TypeAlias = dict[str, Any]

_OPAQUE = (nn.MultiheadAttention, nn.Bilinear)


def layer_sizes(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sizes:
    """Return the size attributes that a module should have, given its own tensors after a cut.

    Args:
        name: Qualified name of the module, for messages.
        module: The module, still with its old tensors and attributes.
        tensors: Its own parameters and buffers after the cut, by local name.

    Returns:
        Attribute values; empty for a module that keeps no sizes.

    Raises:
        ParameterError: If the layer packs several matrices into one tensor, or its tensors do not
            fit its number of groups any more.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 3)
        >>> layer_sizes("fc", layer, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})
        {'out_features': 2, 'in_features': 4}
    """
    if isinstance(module, _OPAQUE):
        raise ParameterError(
            f"Expected a layer with one matrix per tensor, got `{name}` of {type(module).__name__},"
            " whose units cannot be cut."
        )
    for matches, sizes in _RULES:
        if matches(module):
            return sizes(name, module, tensors)
    return {}


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution filters each channel for itself: one output for every input.

    Example:
        >>> is_depthwise(nn.Conv2d(4, 4, 3, groups=4)), is_depthwise(nn.Conv2d(4, 8, 3, groups=4))
        (True, False)
    """
    return (
        isinstance(module, _ConvNd)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def _linear(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sizes:
    outputs, inputs = tensors["weight"].shape
    return {"out_features": outputs, "in_features": inputs}


def _hf_conv1d(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sizes:
    inputs, outputs = tensors["weight"].shape
    return {"nf": outputs, "nx": inputs}


def _convolution(name: str, module: Any, tensors: Mapping[str, Tensor]) -> Sizes:
    first, second = tensors["weight"].shape[:2]
    if is_depthwise(module):
        return {"out_channels": first, "in_channels": first, "groups": first}
    transposed = isinstance(module, _ConvTransposeNd)
    own, shared = ("in_channels", "out_channels") if transposed else ("out_channels", "in_channels")
    if first % module.groups:
        raise ParameterError(
            f"Expected the channels of `{name}` to fall into its {module.groups} groups, got "
            f"{first}."
        )
    return {own: first, shared: second * module.groups}


def _features(attribute: str) -> Callable[[str, nn.Module, Mapping[str, Tensor]], Sizes]:
    def sizes(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sizes:
        vectors = [tensor for tensor in tensors.values() if tensor.dim() == 1]
        return {attribute: vectors[0].shape[0]} if vectors else {}

    return sizes


def _layer_norm(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sizes:
    return {"normalized_shape": tuple(tensors["weight"].shape)} if "weight" in tensors else {}


def _embedding(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sizes:
    rows, columns = tensors["weight"].shape
    return {"num_embeddings": rows, "embedding_dim": columns}


def _recurrent(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sizes:
    layer = "_l0" if isinstance(module, RNNBase) else ""
    return {
        "input_size": tensors[f"weight_ih{layer}"].shape[1],
        "hidden_size": tensors[f"weight_hh{layer}"].shape[1],
    }


def _a(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, kinds)


_RULES: tuple[tuple[Callable[[nn.Module], bool], Callable[..., Sizes]], ...] = (
    (_a(nn.Linear), _linear),
    (is_hf_conv1d, _hf_conv1d),
    (_a(_ConvNd), _convolution),
    (_a(_NormBase), _features("num_features")),
    (_a(nn.GroupNorm), _features("num_channels")),
    (_a(nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (_a(nn.PReLU), _features("num_parameters")),
    (_a(nn.Embedding), _embedding),
    (_a(RNNBase, RNNCellBase), _recurrent),
)
