"""Convolutions of one to three dimensions, with groups, strides, dilation and any padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from torchprune_bayes.curvature.layers.gradients import (
    DenseGradients,
    OuterProducts,
    SampleGradients,
)
from torchprune_bayes.curvature.layers.rule import LayerRule


class ConvolutionRule(LayerRule):
    """A linear layer on the patches of the input, in every group of channels."""

    has_factors = True

    def applies_to(self, module: nn.Module) -> bool:
        """Whether this is such a layer."""
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerRule.gradients`."""
        layer = cast("nn.Conv2d", module)
        parts = g.shape[0] // samples
        # [B parts, out, ...] as [B, groups, out/groups, parts positions]
        outputs = g.reshape(samples, parts, layer.groups, -1, g[0, 0].numel())
        left = outputs.permute(0, 2, 3, 1, 4).flatten(3)

        def right(chunk: slice) -> Tensor:
            found = patches(layer, saved[chunk.start * parts : chunk.stop * parts])
            split = found.unflatten(1, (layer.groups, -1)).unflatten(0, (-1, parts))
            return split.permute(0, 2, 3, 1, 4).flatten(3)

        columns = layer.in_channels * torch.Size(layer.kernel_size).numel()
        weight = OuterProducts(left, right, columns * left.shape[-1], layer.weight.shape)
        return {"weight": weight, "bias": DenseGradients(outputs.sum((1, 4)).flatten(1))}


def patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What the kernel of a convolution of any dimension is multiplied with.

    Args:
        layer: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        inputs: ``[n, in, ...]``.

    Returns:
        ``[n, in * kernel, positions]``.

    Example:
        >>> patches(nn.Conv1d(1, 1, 2), torch.arange(4.0).view(1, 1, 4))
        tensor([[[0., 1., 2.],
                 [1., 2., 3.]]])
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    margins = layer._reversed_padding_repeated_twice
    padded = pad(inputs, margins, mode).contiguous() if any(margins) else inputs.contiguous()
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, d, s in zip(padded.shape[2:], kernel, dilation, stride, strict=True)
    ]
    steps = padded.stride()
    inner = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
    outer = [step * s for step, s in zip(steps[2:], stride, strict=True)]
    shape = (*padded.shape[:2], *kernel, *sizes)
    view = padded.as_strided(shape, (*steps[:2], *inner, *outer))
    return view.reshape(len(padded), -1, torch.Size(sizes).numel())
