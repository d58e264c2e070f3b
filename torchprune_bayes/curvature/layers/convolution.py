"""Convolutions of one to three dimensions, with groups, strides, dilation and any padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from torchprune_bayes.curvature.layers.gradients import (
    DenseGradients,
    OuterProducts,
    SampleGradients,
    samples_at_once,
)
from torchprune_bayes.curvature.layers.grams import Axis, Gram, PatchGram, shares_products
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
        outputs = g.contiguous().view(samples, parts, layer.groups, -1, g[0, 0].numel())
        left = outputs.permute(0, 2, 3, 1, 4).flatten(3)

        def right(chunk: slice) -> Tensor:
            found = patches(layer, saved[chunk.start * parts : chunk.stop * parts])
            split = found.unflatten(1, (layer.groups, -1)).unflatten(0, (-1, parts))
            return split.permute(0, 2, 3, 1, 4).flatten(3)

        weight = PatchProducts(layer, saved, left, right)
        return {"weight": weight, "bias": DenseGradients(outputs.sum((1, 4)).flatten(1))}


class PatchProducts(OuterProducts):
    """The gradients by a convolution's weight.

    Args:
        layer: The convolution.
        images: Its inputs, ``[B parts, in, ...]``.
        left: See :class:`OuterProducts`.
        right: See :class:`OuterProducts`; cuts the patches out of the images.
    """

    def __init__(
        self, layer: nn.Conv2d, images: Tensor, left: Tensor, right: Callable[[slice], Tensor]
    ) -> None:
        columns = layer.in_channels * torch.Size(layer.kernel_size).numel()
        super().__init__(left, right, columns * left.shape[-1], layer.weight.shape)
        self._layer, self._images = layer, images

    def new_input_gram(self, like: Tensor) -> Gram | PatchGram:
        """One that does not need the patches, where that is less work."""
        layer, size = self._layer, list(_padded(self._layer, self._images[:1]).shape[2:])
        axes = [axis_of(layer, dimension) for dimension in range(len(size))]
        if len(size) > 2:
            return super().new_input_gram(like)
        if len(size) == 1:  # a line is an image of one row
            axes, size = [Axis(1), *axes], [1, *size]
        rows, columns = axes
        if not shares_products(layer.in_channels, rows, columns, size):
            return super().new_input_gram(like)
        return PatchGram(layer.in_channels, rows, columns, like)

    def add_input_gram(self, gram: Gram | PatchGram) -> None:
        """Add ``Σ_n Σ_t a aᵀ``."""
        if not isinstance(gram, PatchGram):
            super().add_input_gram(gram)
            return
        for images in self._images.split(samples_at_once(self._images)):
            padded = _padded(self._layer, images)
            gram.add(padded if padded.ndim == 4 else padded.unsqueeze(2))


def axis_of(layer: nn.Conv2d, dimension: int) -> Axis:
    """How a convolution's kernel moves along one of its dimensions.

    Example:
        >>> axis_of(nn.Conv2d(1, 1, 3, padding=(0, 2), stride=2), 1)
        Axis(taps=3, stride=2, dilation=1, zeros=(2, 2))
    """
    # As `pad` wants them: the last dimension comes first.
    before, after = layer._reversed_padding_repeated_twice[-2 * dimension - 2 :][:2]
    zeros = (before, after) if layer.padding_mode == "zeros" else (0, 0)
    steps = layer.kernel_size, layer.stride, layer.dilation
    taps, stride, dilation = (sizes[dimension] for sizes in steps)
    return Axis(taps, stride, dilation, zeros)


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
    padded = _padded(layer, inputs).contiguous()
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


def _padded(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    margins = layer._reversed_padding_repeated_twice
    return pad(inputs, margins, mode) if any(margins) else inputs
