"""A layer that reads units: moments of its inputs, and fits on those that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.input_moments import Fit, Moments, least_squares, refitted
from torchprune_bayes._numerics.precision import float64_device, wide
from torchprune_bayes.structured._layer_inputs import as_matrix, as_weight, rows_of, taps_of

_ROWS_PER_ENTRY, _LEAST_ROWS = 32, 16384


class Statistics(NamedTuple):
    """Mean and variance of each channel, float64."""

    mean: Tensor
    variance: Tensor


class InputSummary(NamedTuple):
    """Moments of those inputs of a layer that are not always zero.

    Attributes:
        mean: Their mean.
        second: Their covariance; mean products if there is no bias to fit.
        seen: Which inputs these are.
    """

    mean: Tensor
    second: Tensor
    seen: Tensor


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
        halves: Moments of two halves of its inputs, once they were recorded.
        summary: Those of all inputs in the place of the halves, see :meth:`summarise`.
    """

    name: str
    path: str
    module: nn.Module
    dim: int
    norm: nn.Module | None = None
    halves: tuple[Moments, Moments] | None = None
    summary: InputSummary | None = None

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
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
        size = self.weight.shape[self.dim] * taps_of(self.module)
        if self.halves is None:
            self.halves = Moments.zeros(size, inputs.device), Moments.zeros(size, inputs.device)
        per_sample = -(-max(_ROWS_PER_ENTRY * size, _LEAST_ROWS) // samples)
        for half, moments in enumerate(self.halves):
            part = inputs[(half + self._seen) % 2 :: 2]
            if part.numel():
                for rows in rows_of(self.module, part, per_sample, self._generator):
                    moments.add(rows)
        self._seen += len(inputs)

    def fit(self, keep: Tensor, damping: float | str) -> tuple[Fit, dict[str, Tensor]]:
        """Fit the layer on some of its inputs; weights of inputs that are always zero stay.

        Args:
            keep: Boolean, one for each input channel or feature.
            damping: See :func:`~torchprune_bayes._numerics.input_moments.least_squares`.

        Returns:
            The fit, and the new weight and bias by local name.
        """
        assert self.halves is not None
        seen = _ever_nonzero(self.halves)
        matrix, kept = self._matrix, self._kept_inputs(keep)
        one, other = (half.of(seen) for half in self.halves)
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
        if self.halves is None:
            return
        seen = _ever_nonzero(self.halves)
        whole, self.halves = self.halves[0].of(seen) + self.halves[1].of(seen), None
        self.summary = InputSummary(whole.mean(), whole.second(centred=self._has_intercept), seen)

    def refit(self, keep: Tensor, damping: float) -> dict[str, Tensor]:
        """Return the tensors of :meth:`fit` with a fixed damping, from the summary."""
        assert self.summary is not None
        mean, second, seen = self.summary
        matrix, kept = self._matrix, self._kept_inputs(keep)
        shifted = mean if self._has_intercept else None
        weight, shift = refitted(matrix[:, seen], kept[seen], shifted, second, damping)
        return self._tensors(_completed(weight, matrix * kept, seen), shift)

    def output_statistics(self, tensors: Mapping[str, Tensor]) -> Statistics:
        """Mean and variance of the outputs with a weight and bias, which a batch norm reads."""
        assert self.summary is not None
        assert self._has_intercept
        matrix = wide(as_matrix(self.module, tensors["weight"]))[:, self.summary.seen]
        bias = tensors.get("bias", self.module._parameters.get("bias"))
        mean = matrix @ self.summary.mean + (0.0 if bias is None else wide(bias.detach()))
        return Statistics(mean, ((matrix @ self.summary.second) * matrix).sum(1))

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


def _ever_nonzero(halves: tuple[Moments, Moments]) -> Tensor:
    """Inputs that are not always zero: those that are, as taps that only see padding, fit nothing.

    With 3 x 3 kernels on maps of a single pixel these are eight of nine.
    """
    return (halves[0].products.diagonal() != 0) | (halves[1].products.diagonal() != 0)


def _completed(fitted: Tensor, cut: Tensor, seen: Tensor) -> Tensor:
    """A fitted matrix with the columns of inputs that are always zero as they were cut."""
    return cut.index_copy(1, seen.nonzero()[:, 0], fitted)
