"""Inputs of a layer as rows of a matrix product: patches of a convolution, vectors otherwise.

In plain words: every layer that reads units computes ``rows @ matrix.T + bias``. Here are the rows,
the matrix, and the way back from a matrix to a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.layer_kinds.convolution import padded, windows

_CHUNK_BYTES = 2**24


def is_readable(module: nn.Module) -> bool:
    """Whether a layer is one matrix product over rows of its input.

    Example:
        >>> is_readable(nn.Conv2d(2, 2, 3)), is_readable(nn.Bilinear(2, 2, 2))
        (True, False)
    """
    return kind_of(module).is_matrix(module)


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight as ``[outputs, entries of a row]``."""
    return kind_of(module).as_matrix(weight)


def as_weight(module: nn.Module, matrix: Tensor, like: Tensor) -> Tensor:
    """Return a matrix of :func:`as_matrix` in the shape, type and place of the weight ``like``."""
    return kind_of(module).as_weight(matrix, like).to(like).contiguous()


def taps_of(module: Any) -> int:
    """Return how many entries of a row belong to each input channel or feature."""
    return int(module.weight[0, 0].numel())


def batched(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return inputs with samples along the first dimension, as a layer may be called without."""
    kernel = getattr(module, "kernel_size", ())
    return inputs.unsqueeze(0) if inputs.dim() == 1 + len(kernel) else inputs


def taps_inside(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return which taps of a layer's kernel ever see an input, boolean; one if it has no kernel.

    Example:
        >>> pixel = torch.zeros(1, 4, 1, 1)
        >>> taps_inside(nn.Conv2d(4, 4, 3, padding=1), pixel).tolist().index(True)
        4
    """
    if not isinstance(module, _ConvNd):
        return torch.ones(1, dtype=torch.bool)
    spatial = len(module.kernel_size)
    sizes = inputs.shape[-spatial:]
    return _windows(module, torch.ones(1, 1, *sizes)).flatten(2 + spatial).any(-1).flatten()


def places_of(module: nn.Module, inputs: Tensor) -> int:
    """Return how many places a convolution's kernel has on each input."""
    spatial = inputs.dim() - 2
    return _windows(module, inputs[:1, :1]).shape[-spatial:].numel()


def sum_of_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the sum of all rows of a convolution, ``[entries]``."""
    spatial = inputs.dim() - 2
    views = _windows(module, inputs.sum(0, keepdim=True))
    return views.flatten(2 + spatial).sum(-1).flatten()


def rows_of(
    module: nn.Module,
    inputs: Tensor,
    per_sample: int,
    generator: torch.Generator,
    taps: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield what the layer multiplies its matrix with, ``[rows, entries]``, a few MiB at a time.

    Args:
        module: A layer that :func:`is_readable`.
        inputs: Its input, with the samples along the first dimension.
        per_sample: Largest number of rows per sample; if it has more (positions of a convolution or
            a sequence), that many are drawn.
        generator: Random generator for the draw.
        taps: The taps of its kernel that rows have, boolean; all by default.

    Cost: a convolution's patches are copied.
    """
    if not isinstance(module, _ConvNd):
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        chosen = _drawn(rows.shape[1], per_sample, generator, inputs.device)
        yield (rows if chosen is None else rows[:, chosen]).flatten(0, 1)
        return
    spatial = len(module.kernel_size)
    for part in inputs.split(_samples_at_once(module, inputs, per_sample)):
        views = _windows(module, part)
        sizes = views.shape[-spatial:]
        chosen = _drawn(sizes.numel(), per_sample, generator, inputs.device)
        if chosen is None:
            chosen = torch.arange(sizes.numel(), device=inputs.device)
        kernel = views.shape[2:-spatial]
        used = torch.arange(kernel.numel()) if taps is None else taps.nonzero()[:, 0]
        under = [each[:, None] for each in torch.unravel_index(used.to(inputs.device), kernel)]
        places = torch.unravel_index(chosen, sizes)
        yield views[_index(2, [*under, *places])].flatten(1, 2).transpose(1, 2).flatten(0, 1)


def _index(skipped: int, rest: Iterable[Any]) -> Any:
    """An index with all of the first dimensions."""
    return (*[slice(None)] * skipped, *rest)


def _drawn(
    size: int, wanted: int, generator: torch.Generator, device: torch.device
) -> Tensor | None:
    """Random indices below ``size``, or ``None`` for all of them."""
    if size <= wanted:
        return None
    return torch.randperm(size, generator=generator)[:wanted].to(device)


def _samples_at_once(module: Any, inputs: Tensor, per_sample: int) -> int:
    row = 8 * taps_of(module) * inputs.shape[1]
    return max(1, _CHUNK_BYTES // (row * min(per_sample, inputs[0, 0].numel())))


def _windows(module: Any, inputs: Tensor) -> Tensor:
    """Views of the entries under the kernel, ``[samples, channels, *taps, *positions]``."""
    if isinstance(module, _ConvTransposeNd):
        once = (1,) * len(module.kernel_size)
        return windows(_spread(module, inputs), module.kernel_size, module.dilation, once)
    return windows(padded(module, inputs), module.kernel_size, module.dilation, module.stride)


def _spread(module: Any, inputs: Tensor) -> Tensor:
    """Inputs of a transposed convolution, ``stride`` apart with zeros between, and padded."""
    shape = [
        (size - 1) * step + 1 for size, step in zip(inputs.shape[2:], module.stride, strict=True)
    ]
    wide = inputs.new_zeros(*inputs.shape[:2], *shape)
    wide[_index(2, [slice(None, None, step) for step in module.stride])] = inputs
    margins: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) - module.padding[axis]
        margins += [reach, reach + module.output_padding[axis]]
    return pad(wide, margins)
