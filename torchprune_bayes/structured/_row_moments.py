"""Moments of the rows that a layer multiplies its matrix with, in two halves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.input_moments import Moments
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.layer_kinds.convolution import add_patches, patch_gram
from torchprune_bayes.layer_kinds.grams import PatchGram
from torchprune_bayes.structured._layer_inputs import (
    places_of,
    rows_of,
    sum_of_rows,
    taps_inside,
    taps_of,
)


class RowMoments:
    """Moments of two halves of a layer's rows.

    Taps of a kernel that only see padding take no memory: on maps of a single pixel these are
    eight of nine. Products of pixels are shared between taps where that is less work than cutting
    out patches, see :class:`~torchprune_bayes.layer_kinds.grams.PatchGram`.

    Args:
        module: The layer.
        channels: Channels or features of its input.
        device: Where its input is.
    """

    def __init__(self, module: nn.Module, channels: int, device: torch.device) -> None:
        self._module: Any = module
        self._channels = channels
        self._taps = torch.zeros(taps_of(module), dtype=torch.bool)
        self._halves = [Moments.zeros(0, device), Moments.zeros(0, device)]
        self._grams: list[PatchGram | None] = [None, None]
        self._shares: dict[torch.Size, bool] = {}
        self._generator = torch.Generator().manual_seed(0)

    def add(self, half: int, inputs: Tensor, per_sample: int) -> None:
        """Count inputs in.

        Args:
            half: Which half, 0 or 1.
            inputs: Inputs of the layer, with the samples along the first dimension.
            per_sample: Largest number of rows of a sample, of which others are drawn.
        """
        self._widen(taps_inside(self._module, inputs))
        moments, gram = self._halves[half], self._gram(half, inputs, per_sample)
        if gram is None:
            for rows in rows_of(self._module, inputs, per_sample, self._generator, self._taps):
                moments.add(rows)
            return
        images = wide(inputs)
        moments.total += sum_of_rows(self._module, images)
        moments.count += len(images) * places_of(self._module, images)
        add_patches(gram, self._module, images)

    def both(self) -> tuple[Moments, Moments]:
        """Return the moments of the halves, of the entries at taps that ever see an input."""
        for moments, gram in zip(self._halves, self._grams, strict=True):
            if gram is not None:
                moments.products += gram.matrix()
        self._grams = [None, None]
        one, other = self._halves
        return one, other

    def halves(self) -> tuple[Tensor, Moments, Moments]:
        """Return which entries of a row are not always zero, boolean, and moments of these."""
        one, other = self.both()
        nonzero = (one.products.diagonal() != 0) | (other.products.diagonal() != 0)
        seen = torch.zeros(self._channels, len(self._taps), dtype=torch.bool, device=nonzero.device)
        seen[:, self._taps.to(seen.device)] = nonzero.reshape(self._channels, -1)
        return seen.flatten(), one.of(nonzero), other.of(nonzero)

    def _widen(self, inside: Tensor) -> None:
        """Make room for further taps."""
        taps = self._taps | inside
        if not torch.equal(taps, self._taps):
            present = self._taps[taps].repeat(self._channels)
            self._halves = [half.among(present) for half in self._halves]
            self._taps = taps

    def _gram(self, half: int, inputs: Tensor, per_sample: int) -> PatchGram | None:
        """Sums over pixels, where these are less work than patches."""
        if not isinstance(self._module, (nn.Conv1d, nn.Conv2d)) or not bool(self._taps.all()):
            return None
        size = inputs.shape[2:]
        if size not in self._shares:
            self._shares[size] = self._new_gram(inputs, per_sample) is not None
        if self._shares[size] and self._grams[half] is None:
            self._grams[half] = self._new_gram(inputs, per_sample)
        return self._grams[half] if self._shares[size] else None

    def _new_gram(self, inputs: Tensor, per_sample: int) -> PatchGram | None:
        drawn = min(per_sample, places_of(self._module, inputs))
        return patch_gram(self._module, inputs, self._halves[0].total, drawn)
