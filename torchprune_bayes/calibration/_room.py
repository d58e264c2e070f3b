"""Memory for the gradients of a pass: the caller's, or new chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchprune_bayes._numerics.remaining_vector import RemainingVector


class GradientRoom:
    """Gradients of single samples, ``[rows, width]``, a chunk of rows at a time.

    Args:
        remaining: Which entries take part, and in which order.
        touched: Tensors of the range, each with its range of remaining entries, as
            :meth:`RemainingVector.overlap` gives them.
        out: Memory for all rows; ``None`` for a new tensor for every chunk.

    Attributes:
        done: Rows so far.
    """

    def __init__(
        self,
        remaining: RemainingVector,
        touched: Sequence[tuple[str, int, int]],
        out: Tensor | None = None,
    ) -> None:
        self._remaining, self._out, self.done = remaining, out, 0
        self._touched = touched
        self._opened: Tensor | None = None

    def views(self, count: int, like: Tensor) -> dict[str, Tensor] | None:
        """The next rows as ``{name: [count, *shape]}``, to be written to.

        ``None`` if some entries of a tensor are left out, so that a copy is needed.
        """
        shapes = {name: mask.shape for name, mask in self._remaining.masks.items()}
        if any(high - low < shapes[name].numel() for name, low, high in self._touched):
            return None
        self._opened = self._next(count, like)
        parts = self._opened.split([high - low for _, low, high in self._touched], dim=1)
        return {
            name: part.unflatten(1, shapes[name])
            for (name, _, _), part in zip(self._touched, parts, strict=True)
        }

    def filled(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Rows of gradients ``{name: [count, *shape]}``, written already or not, ``[count, D]``."""
        if self._opened is not None:
            rows, self._opened = self._opened, None
            return rows
        first = next(iter(gradients.values()))
        rows = self._next(len(first), first)
        for part, entries in self._columns(rows, gradients):
            part.copy_(entries)
        return rows

    def go_back_to(self, done: int) -> None:
        """Discard the rows after the first ``done``, which are written again."""
        self.done, self._opened = done, None

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """The parts of rows by the name of their tensor."""
        sizes = [high - low for _, low, high in self._touched]
        names = [name for name, _, _ in self._touched]
        return dict(zip(names, rows.split(sizes, dim=1), strict=True))

    def _columns(
        self, rows: Tensor, gradients: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        ours = self.columns(rows)
        return [
            (ours[name], self._remaining.entries(name, gradients[name])[:, low:high])
            for name, low, high in self._touched
        ]

    def _next(self, count: int, like: Tensor) -> Tensor:
        start, self.done = self.done, self.done + count
        if self._out is not None:
            return self._out[start : self.done]
        width = sum(high - low for _, low, high in self._touched)
        return torch.empty((count, width), dtype=like.dtype, device=like.device)
