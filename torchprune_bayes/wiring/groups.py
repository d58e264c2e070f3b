"""Groups of units: which entries of which tensors a channel, a hidden unit or a head owns.

In plain words: removing channel 3 of a layer removes row 3 of its weight and bias, entry 3 of the
norm behind it, and column 3 of every layer that reads it. A :class:`UnitGroup` lists these tensors
once for all units that are removed in the same way. Everything structured uses such lists:
scoring, masking, slicing, saving, and carrying optimizer state along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torchprune_bayes.errors import ArgumentError

Role: TypeAlias = Literal["producer", "norm", "consumer"]
"""Whether a tensor makes the units' output, rescales it, or reads it."""

Kind: TypeAlias = Literal["channel", "hidden", "head", "dimension"]

Kept: TypeAlias = Mapping[str, Tensor]
"""Units that stay, by the name of their group; a group that is missing stays whole."""


@dataclass(frozen=True)
class UnitSlice:
    """The positions along one dimension of one tensor that belong to each unit of a group.

    Attributes:
        name: Qualified name of a parameter or buffer.
        dim: Dimension that is cut.
        positions: Long tensor of shape (units, entries per unit); unit ``u`` owns the entries
            ``positions[u]`` along ``dim``. A row holds several entries for heads, for flattened
            maps, and for fused projections.
        role: ``"producer"`` (output side of a layer), ``"norm"`` (affine parameters and running
            statistics in between) or ``"consumer"`` (input side of a layer).
    """

    name: str
    dim: int
    positions: Tensor
    role: Role


@dataclass(frozen=True)
class AttributeRule:
    """A number on a module that depends on the units: ``module.attribute = per_unit * units kept``.

    Sizes that follow from a layer's own tensors (``in_features``, ``num_features``, ...) need
    no rule.

    Attributes:
        module: Qualified name of the module.
        attribute: Name of the number.
        per_unit: Amount of it per unit.
        power: Power of the product; ``-0.5`` for the scale of attention. A power other than 1 makes
            it a floating point number.
    """

    module: str
    attribute: str
    per_unit: int = 1
    power: float = 1.0

    def value(self, units: int) -> float:
        """Return the number for a number of units."""
        total = self.per_unit * units
        return total if self.power == 1.0 else float(total) ** self.power


@dataclass(frozen=True)
class HeadPart:
    """Slices whose dimensions inside heads are chosen together: queries with keys, or values.

    All heads keep the same number of dimensions, but each may keep its own.

    Attributes:
        slices: Indices of the group's slices.
        heads: Number of heads in which dimensions can be chosen separately. The positions of these
            slices are ``[units, heads * entries]``, one head after the other; with 1, all heads
            lose the same dimensions.
        rescaled: Whether remaining entries are multiplied by ``(units kept / units) ** 0.25``, in
            queries and keys both, so that products keep their scale in a module that divides them
            by the square root of the number of dimensions.
    """

    slices: tuple[int, ...]
    heads: int
    rescaled: bool = False


@dataclass(frozen=True)
class UnitGroup:
    """Units that are removed in the same way.

    Attributes:
        name: Qualified name of the producing layer, unique among a model's groups.
        kind: Kind of unit.
        units: Number of units.
        slices: Everything that a unit owns; no tensor dimension appears in two groups with
            overlapping positions.
        attributes: Numbers on modules that depend on the units.
        parts: For dimensions of heads, what is chosen together; empty for all other units.
    """

    name: str
    kind: Kind
    units: int
    slices: tuple[UnitSlice, ...]
    attributes: tuple[AttributeRule, ...] = field(default=())
    parts: tuple[HeadPart, ...] = field(default=())

    @property
    def unread(self) -> tuple[UnitSlice, ...]:
        """Rows of queries and keys, whose dimensions no layer reads, only their product."""
        unread = []
        for part in self.parts:
            pieces = [self.slices[place] for place in part.slices]
            if all(piece.role != "consumer" for piece in pieces):
                unread += [piece for piece in pieces if piece.role == "producer"]
        return tuple(unread)


def check_kept(groups: Sequence[UnitGroup], kept: Kept) -> None:
    """Refuse units that do not exist or repeat, and groups without a remaining unit.

    Raises:
        ArgumentError: For the first such group.

    Example:
        >>> group = UnitGroup("fc1", "hidden", 4, ())
        >>> check_kept([group], {"fc1": torch.tensor([0, 3])})
    """
    units = {group.name: group.units for group in groups}
    if len(units) != len(groups):
        raise ArgumentError("Expected groups with distinct names, got a name twice.")
    for name, indices in kept.items():
        if name not in units:
            raise ArgumentError(f"Expected the name of a group, got {name!r}.")
        if indices.dtype != torch.long or indices.dim() != 1 or not len(indices):
            raise ArgumentError(
                f"Expected a vector of at least one unit to keep in `{name}`, got "
                f"{indices.dtype} of shape {tuple(indices.shape)}."
            )
        in_range = int(indices.min()) >= 0 and int(indices.max()) < units[name]
        if not in_range or len(indices.unique()) != len(indices):
            raise ArgumentError(
                f"Expected distinct units in [0, {units[name]}) to keep in `{name}`, got "
                "repeated ones or others."
            )
