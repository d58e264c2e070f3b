"""Gaussian priors over weights: which entries share a precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._checks import check_positive
from torchprune_bayes._numerics.laplace_blocks import Precision
from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes._numerics.prior_updates import (
    LARGEST,
    SMALLEST,
    canonical_shape,
    matrix_precision,
)
from torchprune_bayes.errors import AlignmentError, ArgumentError


class PriorStructure(str, Enum):
    """Which weights share one prior precision, in laplace-torch's terms where they exist.

    ``"parameterwise"`` is another name of ``"diag"``.

    Example:
        >>> PriorStructure("parameterwise") is PriorStructure.DIAG
        True
    """

    SCALAR = "scalar"
    """One precision for all weights."""

    LAYERWISE = "layerwise"
    """One for each tensor; weights and biases have their own."""

    UNITWISE = "unitwise"
    """``δ_ij = a_i b_j``: one factor per output unit and one per input unit of each tensor.

    Kernel positions of a convolution share theirs; a vector has one per entry."""

    DIAG = "diag"
    """One for each single weight."""

    @classmethod
    def _missing_(cls, value: object) -> PriorStructure | None:
        return cls.DIAG if value == "parameterwise" else None

    @classmethod
    def of(cls, value: str | PriorStructure) -> PriorStructure:
        """The structure of that name.

        Raises:
            ArgumentError: If there is none.
        """
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(repr(member.value) for member in cls)
            raise ArgumentError(
                f"Expected a prior structure of {names} or 'parameterwise', got {value!r}."
            ) from None


@dataclass(frozen=True)
class PriorPrecision:
    """Prior precisions of named tensors, held in as few numbers as the structure needs.

    Attributes:
        structure: Which weights share one.
        shapes: Shapes of the tensors, by qualified name.
        factors: For each tensor, factors whose product broadcasts over
            ``[units, inputs, positions]``, the tensor's shape with all dimensions after the second
            flattened.

    Example:
        >>> prior = PriorPrecision.constant({"weight": (4, 3), "bias": (4,)}, "unitwise", 2.0)
        >>> [tuple(factor.shape) for factor in prior.factors["weight"]]
        [(4, 1, 1), (1, 3, 1)]
        >>> prior.values("weight").shape, float(prior.values("bias").sum())
        (torch.Size([4, 3]), 8.0)
    """

    structure: PriorStructure
    shapes: dict[str, tuple[int, ...]]
    factors: dict[str, tuple[Tensor, ...]]

    @classmethod
    def constant(
        cls,
        shapes: Mapping[str, Sequence[int]],
        structure: str | PriorStructure = PriorStructure.LAYERWISE,
        value: float = 1.0,
        device: torch.device | str | None = None,
    ) -> PriorPrecision:
        """The same precision everywhere.

        Args:
            shapes: Shapes of the tensors, by qualified name.
            structure: ``"scalar"``, ``"layerwise"``, ``"unitwise"`` or ``"diag"``.
            value: The precision.
            device: Where to hold it; the CPU if that has no float64.

        Raises:
            ArgumentError: If the structure is unknown or the value not positive.
        """
        structure = PriorStructure.of(structure)
        check_positive("value", value)
        all_shapes = {name: tuple(shape) for name, shape in shapes.items()}
        device = None if device is None else float64_device(device)
        factors = {}
        for name, shape in all_shapes.items():
            first, *others = _factor_shapes(structure, canonical_shape(shape))
            # Single precision is enough for factors as large as the weights themselves.
            dtype = torch.float32 if structure is PriorStructure.DIAG else torch.float64
            ones = [torch.ones(size, dtype=dtype, device=device) for size in others]
            factors[name] = (torch.full(first, value, dtype=dtype, device=device), *ones)
        return cls(structure, all_shapes, factors)

    def to(self, device: torch.device) -> PriorPrecision:
        """The same precisions on a device."""
        moved = {
            name: tuple(f.to(device) for f in factors) for name, factors in self.factors.items()
        }
        return PriorPrecision(self.structure, self.shapes, moved)

    def values(self, name: str) -> Tensor:
        """Precisions of one tensor, in its shape; where they are constant, a view of one number."""
        shape = self.shapes[name]
        cube = prod(self.factors[name][1:], start=self.factors[name][0])
        return cube.expand(canonical_shape(shape)).reshape(shape)

    def broadcastable(self, name: str) -> Tensor:
        """Precisions of one tensor, in the smallest shape that broadcasts over its own."""
        shape = self.shapes[name]
        cube = prod(self.factors[name][1:], start=self.factors[name][0])
        if cube.numel() == prod(shape):
            return cube.reshape(shape)
        return cube.reshape((*cube.shape[:2], *[1] * (len(shape) - 2))[: len(shape)])

    def matrix(self, name: str) -> Precision:
        """Precisions of one tensor as a matrix, the first dimension by all others."""
        return matrix_precision(self.factors[name], canonical_shape(self.shapes[name]))

    def with_factors(self, factors: Mapping[str, Sequence[Tensor]]) -> PriorPrecision:
        """The same structure with other values, held within the bounds that updates keep to."""
        clamped = {
            name: tuple(
                new.clamp(SMALLEST, LARGEST).to(old)
                for new, old in zip(factors[name], olds, strict=True)
            )
            for name, olds in self.factors.items()
        }
        return PriorPrecision(self.structure, self.shapes, clamped)

    def state_dict(self) -> dict[str, Any]:
        """Structure and factors, as plain values and tensors."""
        return {
            "structure": self.structure.value,
            "factors": {name: list(factors) for name, factors in self.factors.items()},
        }

    def from_state_dict(self, state: Mapping[str, Any]) -> PriorPrecision:
        """The prior that gave ``state``, for the same tensors as this one.

        Raises:
            AlignmentError: If it is of another structure or for other tensors.
        """
        factors = state["factors"]
        shapes = {name: [f.shape for f in own] for name, own in self.factors.items()}
        same = {name: [f.shape for f in parts] for name, parts in factors.items()} == shapes
        if state["structure"] != self.structure.value or not same:
            raise AlignmentError(
                f"Expected a {self.structure.value} prior of the same tensors, got a "
                f"{state['structure']} one of {len(factors)} tensors."
            )
        return self.with_factors(factors)


def _factor_shapes(
    structure: PriorStructure, shape: tuple[int, int, int]
) -> list[tuple[int, int, int]]:
    units, inputs, positions = shape
    if structure is PriorStructure.DIAG:
        return [shape]
    if structure is PriorStructure.UNITWISE:
        return [(units, 1, 1), (1, inputs, 1)] if inputs * positions > 1 else [(units, 1, 1)]
    return [(1, 1, 1)]
