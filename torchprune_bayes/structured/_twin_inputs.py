"""Inputs to compare a model with itself on: the example, others like it, smaller ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

SMALLEST_SIDE = 56
"""Pixels that smaller images have at least: nearly two behind a stride of 32."""


def inputs_of_seed(
    example_inputs: Any,
    dtype: torch.dtype,
    place: torch.device | None,
    seed: int,
    generator: torch.Generator,
) -> Any:
    """Return the inputs of the example for seed 0, different ones of the same kind from 1 on.

    Args:
        example_inputs: Tensors, nested in any way.
        dtype: What floating point tensors become.
        place: Where all go, ``None`` for where they are.
        seed: From 1 on noise is added to numbers, and indices are moved on by one.
        generator: Draws the noise.
    """
    return tree_map(lambda leaf: _input(leaf, dtype, place, seed, generator), example_inputs)


def smaller(model: nn.Module, inputs: Any) -> Any | None:
    """Return inputs with every second or fourth row and column of their images, or ``None``.

    Only for models most of whose weights are those of convolutions, which do not depend on the
    size of an image, and images that stay as large as :data:`SMALLEST_SIDE`.

    Example:
        >>> smaller(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 224, 256)).shape
        torch.Size([1, 3, 56, 64])
        >>> smaller(nn.Linear(224, 4), torch.zeros(1, 3, 224, 224)) is None
        True
    """
    dims = [parameter.dim() for parameter in model.parameters()]
    images = [leaf for leaf in tree_leaves(inputs) if _is_image(leaf)]
    side = min((size for leaf in images for size in leaf.shape[-2:]), default=0)
    step = next((step for step in (4, 2) if side >= step * SMALLEST_SIDE), 1)
    if step == 1 or dims.count(4) <= dims.count(2):
        return None
    return tree_map(
        lambda leaf: leaf[..., ::step, ::step].contiguous() if _is_image(leaf) else leaf, inputs
    )


def _is_image(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 4


def _input(
    leaf: Any,
    dtype: torch.dtype,
    place: torch.device | None,
    seed: int,
    generator: torch.Generator,
) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.to(place or leaf.device)
    if leaf.is_floating_point():
        value = leaf.detach().to(dtype)
        if not seed:
            return value
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float32).to(value)
        return value + noise
    return leaf.roll(1, -1) if seed and leaf.dim() and leaf.dtype != torch.bool else leaf
