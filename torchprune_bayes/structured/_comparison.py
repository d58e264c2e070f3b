"""Comparison of the outputs of two models, and where they begin to differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchprune_bayes.errors import NumericalError


def compare(masked: Sequence[Tensor], shrunk: Sequence[Tensor]) -> tuple[float, int]:
    """Return the largest difference, relative to the largest output, and the entries compared.

    Raises:
        NumericalError: If shapes differ, or entries that are finite do.
    """
    shapes = [[tuple(tensor.shape) for tensor in outputs] for outputs in (masked, shrunk)]
    if shapes[0] != shapes[1]:
        raise NumericalError(
            f"Expected outputs of shapes {shapes[0]} from the shrunk model, got {shapes[1]}."
        )
    largest, count = 0.0, 0
    for one, other in zip(masked, shrunk, strict=True):
        finite = one.isfinite()
        if not torch.equal(finite, other.isfinite()):
            raise NumericalError(
                "Expected the shrunk model's outputs to be finite where those of the whole one "
                "are, got others: its wiring is not understood."
            )
        compared = int(finite.sum())
        if compared:
            if compared < one.numel():
                one, other = one[finite], other[finite]
            scale = float(one.abs().max()) or 1.0
            largest = max(largest, float((one - other).abs().max()) / scale)
        count += compared
    return largest, count


def compare_inner(
    masked: Mapping[str, list[Tensor]], shrunk: Mapping[str, list[Tensor]]
) -> tuple[float, int]:
    """Compare modules whose outputs keep their shapes, for models that return nothing finite."""
    largest, count = 0.0, 0
    for name, outputs in masked.items():
        others = shrunk.get(name, [])
        if [tensor.shape for tensor in outputs] == [tensor.shape for tensor in others]:
            result, compared = compare(outputs, others)
            largest, count = max(largest, result), count + compared
    return largest, count


def first_other(
    masked: Mapping[str, list[Tensor]], shrunk: Mapping[str, list[Tensor]], tolerance: float
) -> str:
    """Return the name of the first module with a different output of the same shape."""
    for name, outputs in masked.items():
        others = shrunk.get(name, [])
        if [tensor.shape for tensor in outputs] == [tensor.shape for tensor in others]:
            try:
                if compare(outputs, others)[0] > tolerance:
                    return name
            except NumericalError:
                return name
    return ""
