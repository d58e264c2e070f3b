"""Convolutions of one to three dimensions, with groups, strides, dilation and any padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchprune_bayes.errors import ParameterError
from torchprune_bayes.layer_kinds.gradients import (
    DenseGradients,
    SampleGradients,
    samples_at_once,
)
from torchprune_bayes.layer_kinds.grams import Axis, Gram, PatchGram, shares_products
from torchprune_bayes.layer_kinds.kind import LayerKind, Side
from torchprune_bayes.layer_kinds.outer_products import OuterProducts


class _AnyConvolution(LayerKind):
    """What convolutions and transposed ones have in common."""

    prunable = ("weight",)

    def is_matrix(self, module: nn.Module) -> bool:
        """Without groups."""
        return cast("nn.Conv2d", module).groups == 1

    def is_per_unit(self, module: nn.Module) -> bool | None:
        """Depthwise ones."""
        return True if is_depthwise(module) else None

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``out_channels``, ``in_channels`` and, of depthwise ones, ``groups``."""
        first, second = tensors["weight"].shape[:2]
        if is_depthwise(module):
            return {"out_channels": first, "in_channels": first, "groups": first}
        if first % module.groups:
            raise ParameterError(
                f"Expected the channels of `{name}` to fall into its {module.groups} groups, got "
                f"{first}."
            )
        own, shared = "out_channels", "in_channels"
        if self.output_dim:
            own, shared = shared, own
        return {own: first, shared: second * module.groups}


class ConvolutionKind(_AnyConvolution):
    """A linear layer on the patches of the input, in every group of channels."""

    has_factors = True

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def gate_entries(self, module: nn.Module, side: Side) -> int | None:
        """Channels; in front of a layer only without groups."""
        layer = cast("nn.Conv2d", module)
        if side == "in":
            return layer.in_channels if layer.groups == 1 else None
        return layer.out_channels

    def uses(
        self, module: nn.Module, name: str, inputs: Sequence[Tensor], output: Any
    ) -> float | None:
        """Positions of the output."""
        return output.numel() / cast("nn.Conv2d", module).out_channels

    def has_gradients(self, module: nn.Module) -> bool:
        """Always."""
        return True

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerKind.gradients`."""
        layer = cast("nn.Conv2d", module)
        parts = g.shape[0] // samples
        # [B parts, out, ...] as [B, groups, out/groups, parts positions]
        outputs = g.contiguous().view(samples, parts, layer.groups, -1, g[0, 0].numel())
        left = outputs.permute(0, 2, 3, 1, 4).flatten(3)

        def right(chunk: slice) -> Tensor:
            columns = patches(layer, saved[chunk.start * parts : chunk.stop * parts])
            split = columns.unflatten(1, (layer.groups, -1)).unflatten(0, (-1, parts))
            return split.permute(0, 2, 3, 1, 4).flatten(3)

        weight = PatchProducts(layer, saved, left, right)
        return {"weight": weight, "bias": DenseGradients(outputs.sum((1, 4)).flatten(1))}


class TransposedConvolutionKind(_AnyConvolution):
    """A convolution of the inputs, spread out, with the flipped kernel."""

    input_dim = 0
    output_dim = 1

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, _ConvTransposeNd)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Of the flipped kernel."""
        return weight.flip(tuple(range(2, weight.dim()))).transpose(0, 1).flatten(1)

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Flipped back."""
        shape = (like.shape[1], like.shape[0], *like.shape[2:])
        return matrix.reshape(shape).transpose(0, 1).flip(tuple(range(2, like.dim())))

    def uses(
        self, module: nn.Module, name: str, inputs: Sequence[Tensor], output: Any
    ) -> float | None:
        """Positions of the input."""
        return inputs[0].numel() / cast("nn.ConvTranspose2d", module).in_channels


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution filters each channel for itself: one output for every input.

    Example:
        >>> is_depthwise(nn.Conv2d(4, 4, 3, groups=4)), is_depthwise(nn.Conv2d(4, 8, 3, groups=4))
        (True, False)
    """
    if not isinstance(module, _ConvNd):
        return False
    return module.groups > 1 and module.groups == module.in_channels == module.out_channels


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
        return patch_gram(self._layer, self._images, like) or super().new_input_gram(like)

    def add_input_gram(self, gram: Gram | PatchGram) -> None:
        """Add ``Σ_n Σ_t a aᵀ``."""
        if not isinstance(gram, PatchGram):
            super().add_input_gram(gram)
            return
        add_patches(gram, self._layer, self._images)


def patch_gram(
    layer: nn.Conv2d, images: Tensor, like: Tensor, places: int | None = None
) -> PatchGram | None:
    """A sum of the products of a convolution's patches that does not need the patches.

    Args:
        layer: A convolution of any dimension, without groups.
        images: Inputs of the size that all have.
        like: Has the dtype and the device of the sums.
        places: How many patches of an image would be cut out otherwise; all by default.

    Returns:
        ``None`` where cutting the patches out is less work.
    """
    size = list(padded(layer, images[:1]).shape[2:])
    axes = [axis_of(layer, dimension) for dimension in range(len(size))]
    if len(size) > 2:
        return None
    if len(size) == 1:  # a line is an image of one row
        axes, size = [Axis(1), *axes], [1, *size]
    rows, columns = axes
    if not shares_products(layer.in_channels, rows, columns, size, places):
        return None
    return PatchGram(layer.in_channels, rows, columns, like)


def add_patches(gram: PatchGram, layer: nn.Conv2d, images: Tensor) -> None:
    """Add the products of all patches of some images, a few images at a time."""
    for part in images.split(samples_at_once(images)):
        whole = padded(layer, part)
        gram.add(whole if whole.ndim == 4 else whole.unsqueeze(2))


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
    views = windows(padded(layer, inputs), layer.kernel_size, layer.dilation, layer.stride)
    spatial = len(layer.kernel_size)
    return views.reshape(len(inputs), -1, views.shape[-spatial:].numel())


def windows(
    inputs: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """Views of what lies under a kernel, ``[n, in, *kernel, *positions]``; nothing is copied.

    Args:
        inputs: ``[n, in, ...]``, with margins.
        kernel: Its size along each dimension.
        dilation: From one of its entries to the next.
        stride: From one position to the next.
    """
    inputs = inputs.contiguous()
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, d, s in zip(inputs.shape[2:], kernel, dilation, stride, strict=True)
    ]
    steps = inputs.stride()
    inner = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
    outer = [step * s for step, s in zip(steps[2:], stride, strict=True)]
    shape = (*inputs.shape[:2], *kernel, *sizes)
    return inputs.as_strided(shape, (*steps[:2], *inner, *outer))


def padded(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Inputs with the margins of a convolution, of any mode."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    margins = layer._reversed_padding_repeated_twice
    return pad(inputs, margins, mode) if any(margins) else inputs
