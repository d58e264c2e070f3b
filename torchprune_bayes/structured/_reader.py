"""A layer that reads units: moments of its inputs, and fits on those that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.input_moments import Fit, Refits, least_squares
from torchprune_bayes._numerics.precision import float64_device, wide
from torchprune_bayes.structured._layer_inputs import as_matrix, as_weight, batched, taps_of
from torchprune_bayes.structured._row_moments import RowMoments

_ROWS_PER_ENTRY, _LEAST_ROWS = 32, 16384


class Statistics(NamedTuple):
    """Mean and variance of each channel, float64."""

    mean: Tensor
    variance: Tensor


class InputSummary(NamedTuple):
    """What many fits of a layer share.

    Attributes:
        fits: Fits on those inputs that are not always zero.
        mean: Mean of these.
        seen: Which inputs these are.
    """

    fits: Refits
    mean: Tensor
    seen: Tensor


class Refitted(NamedTuple):
    """A layer fitted on some of its inputs.

    Attributes:
        tensors: Its weight, and its bias if it has one, by local name.
        outputs: Statistics of its outputs with these, if a bias or a batch norm follows their mean.
    """

    tensors: dict[str, Tensor]
    outputs: Statistics


def matched(norm: Any, before: Statistics, now: Statistics) -> dict[str, Tensor]:
    """Return running statistics with which a batch norm's outputs keep their mean and variance.

    Where the norm's statistics are those of its inputs, as in a trained network, this is
    recomputing them. Where they are not (before training, or on other data) it changes nothing that
    the inputs did not.

    Args:
        norm: The batch norm.
        before: Statistics of its inputs that correspond to its running statistics.
        now: Statistics of its inputs now.
    """
    mean, variance = (wide(norm._buffers[key]) for key in ("running_mean", "running_var"))
    ratio = (now.variance + norm.eps) / (before.variance + norm.eps)
    moved = now.mean + (mean - before.mean) * ratio.sqrt()
    scaled = ((variance + norm.eps) * ratio - norm.eps).clamp_min(0.0)
    return {
        "running_mean": moved.to(norm._buffers["running_mean"]),
        "running_var": scaled.to(norm._buffers["running_var"]),
    }


@dataclass
class Reader:
    """A layer that reads units.

    Attributes:
        name: First qualified name of its weight.
        path: Qualified name of the layer.
        module: The layer.
        dim: Dimension of the weight along its inputs.
        norm: The batch norm that directly reads its output, if there is one.
        rows: Moments of its inputs, once they were recorded.
        summary: What many fits share, in the place of the moments, see :meth:`summarise`.
    """

    name: str
    path: str
    module: nn.Module
    dim: int
    norm: nn.Module | None = None
    rows: RowMoments | None = None
    summary: InputSummary | None = None

    def __post_init__(self) -> None:
        self._seen = 0

    @property
    def weight(self) -> Tensor:
        """The weight as it is in the forward pass."""
        weight: Any = self.module._parameters["weight"]
        return torch.Tensor.detach(weight)

    @property
    def moment_bytes(self) -> int:
        """Memory that the moments of its inputs take."""
        size = self.weight.shape[self.dim] * taps_of(self.module)
        halves, float64 = 2, 8
        return halves * float64 * size * (size + 1)

    def observe(self, inputs: Tensor, samples: int) -> None:
        """Add inputs to the moments, alternate samples for either half.

        Args:
            inputs: Inputs of the layer.
            samples: Total number of samples; many rows of few samples are subsampled.
        """
        channels = self.weight.shape[self.dim]
        inputs = batched(self.module, inputs)
        if self.rows is None:
            self.rows = RowMoments(self.module, channels, inputs.device)
        entries = channels * taps_of(self.module)
        per_sample = -(-max(_ROWS_PER_ENTRY * entries, _LEAST_ROWS) // samples)
        for half in (0, 1):
            part = inputs[(half + self._seen) % 2 :: 2]
            if part.numel():
                self.rows.add(half, part, per_sample)
        self._seen += len(inputs)

    def fit(self, keep: Tensor, damping: float | str) -> tuple[Fit, dict[str, Tensor]]:
        """Fit the layer on some of its inputs; weights of inputs that are always zero stay.

        Args:
            keep: Boolean, one for each input channel or feature.
            damping: See :func:`~torchprune_bayes._numerics.input_moments.least_squares`.

        Returns:
            The fit, and the new weight and bias by local name.
        """
        assert self.rows is not None
        seen, one, other = self.rows.halves()
        matrix, kept = self._matrix, self._kept_inputs(keep)
        fit = least_squares(
            matrix[:, seen],
            kept[seen],
            (one, other),
            intercept=self._has_intercept,
            damping=damping,
        )
        return fit, self._tensors(_completed(fit.weight, matrix * kept, seen), fit.shift)

    def summarise(self) -> None:
        """Merge the halves, so that many fits share what does not depend on the units."""
        if self.rows is None:
            return
        seen, one, other = self.rows.halves()
        whole, self.rows = one + other, None
        mean, second = whole.mean(), whole.second(centred=self._has_intercept)
        fits = Refits(self._matrix[:, seen], mean if self._has_intercept else None, second)
        self.summary = InputSummary(fits, mean, seen)

    def refit(self, keep: Tensor, damping: float) -> Refitted:
        """Return what :meth:`fit` gives with a fixed damping, from the summary."""
        assert self.summary is not None
        fits, mean, seen = self.summary
        matrix, kept = self._matrix, self._kept_inputs(keep)
        fit = fits.without(kept[seen], damping)
        tensors = self._tensors(_completed(fit.weight, matrix * kept, seen), fit.shift)
        return Refitted(tensors, self._statistics(fit.weight @ mean, fit.second, tensors))

    def output_statistics(self) -> Statistics:
        """Mean and variance of the outputs of the whole layer, which a batch norm reads."""
        assert self.summary is not None
        fits, mean, seen = self.summary
        return self._statistics(self._matrix[:, seen] @ mean, fits.mean_squares(), {})

    def _statistics(
        self, mean: Tensor, second: Tensor, tensors: Mapping[str, Tensor]
    ) -> Statistics:
        bias = tensors.get("bias", self.module._parameters.get("bias"))
        return Statistics(mean if bias is None else mean + wide(bias.detach()), second)

    @property
    def _matrix(self) -> Tensor:
        return wide(as_matrix(self.module, self.weight))

    @property
    def _has_intercept(self) -> bool:
        return self.module._parameters.get("bias") is not None or self.norm is not None

    def _kept_inputs(self, keep: Tensor) -> Tensor:
        return keep.repeat_interleave(taps_of(self.module)).to(float64_device(self.weight.device))

    def _tensors(self, matrix: Tensor, shift: Tensor) -> dict[str, Tensor]:
        bias = self.module._parameters.get("bias")
        result = {"weight": as_weight(self.module, matrix, self.weight)}
        if bias is not None:
            result["bias"] = (wide(bias.detach()) + shift).to(bias)
        return result


def _completed(fitted: Tensor, cut: Tensor, seen: Tensor) -> Tensor:
    """A fitted matrix with the columns of inputs that are always zero as they were cut."""
    return cut.index_copy(1, seen.nonzero()[:, 0], fitted)
