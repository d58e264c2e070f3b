"""Penalties that make weights sparse while a model is trained: terms to add to the loss.

They do not prune: weights become small, and :func:`count_below` tells how many magnitude pruning
can then prune without harm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_positive
from torchprune_bayes.errors import ParameterError
from torchprune_bayes.params import leaf, mask_of, prunable_parameters, without_repeats
from torchprune_bayes.types import ParameterPairs


def hoyer_square(params: ParameterPairs | nn.Module) -> Tensor:
    """``Σ_l (Σ_i |w_i|)² / Σ_i w_i²``, over the tensors ``l``; differentiable.

    `DeepHoyer (Yang, Wen and Li, 2020) <https://arxiv.org/abs/1908.09979>`_. Each term
    lies between 1, for one nonzero weight, and the number of weights, and does not change with
    their scale: it approximates the number of nonzero weights, where an L1 norm only shrinks them.

    Args:
        params: ``(module, name)`` pairs, or a model for its
            :func:`~torchprune_bayes.prunable_parameters`. Pruned entries count as zero, and a
            tensor of zeros gives 0.

    Returns:
        A scalar, in the dtype of the weights.

    Raises:
        ParameterError: If one of the pairs is not a parameter.

    Cost: two passes over the weights.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.0, 2.0, -2.0, 2.0]]))
        >>> hoyer_square(layer).item()
        3.0
    """
    return torch.stack([_ratio(weight.abs()) for weight in _weights(params)]).sum()


def group_hoyer_square(params: ParameterPairs | nn.Module) -> Tensor:
    """``Σ_l [(Σ_o ‖W_o‖)² + (Σ_i ‖W_{·i}‖)²] / ‖W‖²``, over outputs ``o`` and inputs ``i``.

    DeepHoyer's group form (`Yang, Wen and Li, 2020 <https://arxiv.org/abs/1908.09979>`_),
    for the units of both sides of each layer: the first two dimensions of its weight, a group of
    a convolution being a filter or an input channel. Whole rows and columns become small.

    Args:
        params: As in :func:`hoyer_square`; tensors of at least two dimensions.

    Returns:
        A scalar, in the dtype of the weights.

    Raises:
        ParameterError: If one of the pairs is not a parameter or has fewer than two dimensions.

    Cost: three passes over the weights.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> group_hoyer_square(layer).item()  # one output, 25/25; two inputs, (3 + 4)²/25
        2.9600...
    """
    return torch.stack([_grouped(weight) for weight in _weights(params)]).sum()


def count_below(params: ParameterPairs | nn.Module, threshold: float) -> int:
    """How many remaining weights have an absolute value of at most ``threshold``.

    As ``amount`` of magnitude pruning it removes exactly these. The SNIP-it paper's code uses 1e-3
    for weights trained with a Hoyer penalty.

    Raises:
        ArgumentError: If the threshold is not positive.
        ParameterError: If one of the pairs is not a parameter.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.5, 1e-5, -1e-4]]))
        >>> count_below(layer, 1e-3)
        2
    """
    check_positive("threshold", threshold)
    count = 0
    for module, name in _pairs(params):
        mask, weight = mask_of(module, name), _parameter(module, name).detach()
        small = weight.abs() <= threshold
        count += int((small if mask is None else small & (mask != 0)).sum())
    return count


def _grouped(weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        raise ParameterError(
            f"Expected weights of at least two dimensions, got shape {tuple(weight.shape)}."
        )
    outputs = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    inputs = torch.linalg.vector_norm(weight.transpose(0, 1).flatten(1), dim=1)
    return _ratio(outputs) + _ratio(inputs)


def _ratio(sizes: Tensor) -> Tensor:
    """``(Σ s)²/Σ s²``; the smallest float turns 0/0, of a tensor of zeros, into 0."""
    return sizes.sum().square() / (sizes.square().sum() + torch.finfo(sizes.dtype).tiny)


def _weights(params: ParameterPairs | nn.Module) -> list[Tensor]:
    weights = []
    for module, name in _pairs(params):
        weight, mask = _parameter(module, name), mask_of(module, name)
        # Not the tensor made by PyTorch's hook, which dates from the last forward pass.
        weights.append(weight if mask is None else weight * mask)
    return weights


def _pairs(params: ParameterPairs | nn.Module) -> list[tuple[nn.Module, str]]:
    pairs = prunable_parameters(params) if isinstance(params, nn.Module) else params
    return without_repeats(pairs)


def _parameter(module: nn.Module, name: str) -> Tensor:
    tensor = leaf(module, name)
    if tensor is None:
        raise ParameterError(f"Expected a parameter `{name}` of {type(module).__name__}, got none.")
    return tensor
