"""Which gradients a pass computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from torchprune_bayes._numerics.remaining_vector import RemainingVector


@dataclass(frozen=True)
class GradientRequest:
    """The gradients of a pass over the samples of a calibration.

    Attributes:
        weights: Values to take the gradients at, by qualified name; ``None`` for the model's own.
        remaining: Which entries take part, and in which order.
        span: Range ``(start, stop)`` of the remaining vector.
        out: Memory for the rows from ``first`` on, ``[rows, stop - start]``; ``None`` for new
            tensors.
        first: Number of the first gradient; the samples of those before it are drawn only.
    """

    weights: Mapping[str, Tensor] | None
    remaining: RemainingVector
    span: tuple[int, int]
    out: Tensor | None = None
    first: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all remaining entries take part."""
        return self.span == (0, self.remaining.numel)

    def after(self, rows: int) -> GradientRequest:
        """The request for what is missing when the next ``rows`` gradients are there."""
        left = None if self.out is None else self.out[rows:]
        return replace(self, out=left, first=self.first + rows)
