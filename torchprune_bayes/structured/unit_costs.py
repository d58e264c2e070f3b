"""What a model with fewer units costs, exactly, without building it.

In plain words: a layer's weight shrinks by its outputs and by its inputs, and so do the FLOPs of
the layer. So parameters and FLOPs follow from how many units each group keeps, with one forward
pass of the whole model to see how often each weight is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, Protocol, TypeAlias

from torch import nn

from torchprune_bayes._checks import check_choice
from torchprune_bayes.costs import counted_flops
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.slicing import first_names
from torchprune_bayes.wiring.forward import ForwardFunction, at_rest, blaming_inputs, run

Resource: TypeAlias = Literal["params", "channels", "flops", "latency", "memory"]

Units: TypeAlias = Mapping[str, int]
"""How many units are left in each group, by its name; a missing group is whole."""


class Costs(Protocol):
    """What a model takes of a resource, as a function of the units that are left."""

    def total(self, resource: Resource, left: Units) -> float:
        """Return the amount with so many units left in each group."""
        ...


@dataclass(frozen=True)
class TensorSize:
    """The size of a parameter as a function of the units that are left.

    Attributes:
        shape: Its shape with all units.
        entries: For each dimension, how many entries along it each unit of a group owns.
    """

    shape: tuple[int, ...]
    entries: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def numel(self, gone: Units) -> int:
        """Return the number of elements when each group has lost so many units."""
        return prod(
            size - sum(each * gone.get(name, 0) for name, each in self.entries.get(dim, {}).items())
            for dim, size in enumerate(self.shape)
        )


@dataclass(frozen=True)
class UnitCosts:
    """Units, parameters and FLOPs of a model as functions of the units that are left.

    Attributes:
        units: Units of each group with nothing removed.
        sizes: Sizes of all parameters, tied ones once.
        layer_flops: FLOPs of each layer with nothing removed, by the name of its weight.
        head_flops: FLOPs of attention, outside of its projections, by the name of the group. The
            product of queries and keys is taken for half of them, that with the values for half.
        other_flops: FLOPs that no group changes.
    """

    units: Mapping[str, int]
    sizes: Mapping[str, TensorSize]
    layer_flops: Mapping[str, int]
    head_flops: Mapping[str, int]
    other_flops: int

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        example_inputs: Any = None,
        forward_fn: ForwardFunction | None = None,
        flops: Mapping[str, int] | None = None,
    ) -> UnitCosts:
        """Measure a model.

        Args:
            model: The model; wrappers are looked through. It comes out as it went in.
            groups: Its groups.
            example_inputs: What it is called with, to count FLOPs; without them these are zero.
            forward_fn: How to call it otherwise.
            flops: FLOPs by parameter or module, if they are known, as
                :func:`~torchprune_bayes.costs.counted_flops` gives them.

        Returns:
            The costs. FLOPs are those of :func:`~torchprune_bayes.costs.flop_counter` for these
            inputs: two for each multiplication with an addition, in matrix products,
            convolutions and attention, whichever kernels run.

        Raises:
            ArgumentError: If a group names a tensor that does not exist.

        Example:
            >>> import torch
            >>> from torchprune_bayes.structured.tracing import find_groups
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> inputs = torch.zeros(1, 4)
            >>> costs = UnitCosts.measure(model, find_groups(model, inputs), inputs)
            >>> costs.parameters({}), costs.parameters({"0": 3}), costs.flops({"0": 3})
            (58, 23, 36)
        """
        inner = unwrap(model)
        sizes, first = _sizes(inner, groups)
        counted = flops
        if counted is None:
            known = example_inputs is not None
            counted = _own_flops(inner, example_inputs, forward_fn) if known else {}
        layers: dict[str, int] = {}
        heads: dict[str, int] = {}
        other = 0
        for path, count in counted.items():
            # A weight that is computed, as by a cast, counts for its module.
            weight = first.get(path) or first.get(f"{path}.weight" if path else "weight")
            if weight is not None:
                layers[weight] = layers.get(weight, 0) + count
                continue
            for name, halves in _attention_of(path, groups):
                heads[name] = heads.get(name, 0) + count * halves // 2
                other -= count * halves // 2
            other += count
        return cls({group.name: group.units for group in groups}, sizes, layers, heads, other)

    def total(self, resource: Resource, left: Units) -> int:
        """Return what is left of parameters, of units (``"channels"``) or of FLOPs.

        Raises:
            ArgumentError: If the resource is measured rather than counted.
        """
        counts = {"params": self.parameters, "channels": self.count, "flops": self.flops}
        check_choice("resource", resource, counts)
        return counts[resource](left)

    def count(self, left: Units) -> int:
        """Return the number of units that are left."""
        return sum(left.get(name, units) for name, units in self.units.items())

    def parameters(self, left: Units) -> int:
        """Return the number of parameters."""
        gone = self._gone(left)
        return sum(size.numel(gone) for size in self.sizes.values())

    def flops(self, left: Units) -> int:
        """Return the FLOPs of one forward pass on the example inputs."""
        gone = self._gone(left)
        layers = sum(
            flops * self.sizes[name].numel(gone) // (self.sizes[name].numel({}) or 1)
            for name, flops in self.layer_flops.items()
        )
        heads = sum(
            flops * left.get(name, self.units[name]) // self.units[name]
            for name, flops in self.head_flops.items()
        )
        return layers + heads + self.other_flops

    def _gone(self, left: Units) -> dict[str, int]:
        return {name: self.units[name] - count for name, count in left.items()}


def _sizes(
    model: nn.Module, groups: Sequence[UnitGroup]
) -> tuple[dict[str, TensorSize], dict[str, str]]:
    """Sizes of the parameters by first name, and the first name of each tensor by any name."""
    first, tensors = first_names(model)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if isinstance(tensor, nn.Parameter)
    }
    entries: dict[str, dict[int, dict[str, int]]] = {name: {} for name in shapes}
    for group in groups:
        for piece in group.slices:
            if piece.name not in first:
                raise ArgumentError(f"Expected a tensor `{piece.name}` in the model, got none.")
            if first[piece.name] in entries:
                along = entries[first[piece.name]].setdefault(piece.dim, {})
                along[group.name] = along.get(group.name, 0) + piece.positions.shape[1]
    return {name: TensorSize(shape, entries[name]) for name, shape in shapes.items()}, first


def _own_flops(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFunction | None
) -> Mapping[str, int]:
    """FLOPs by parameter or module."""
    with (
        blaming_inputs(model, example_inputs, forward_fn),
        at_rest(model),
        counted_flops(model) as counter,
    ):
        run(model, example_inputs, forward_fn)
    return counter.flops


def _attention_of(path: str, groups: Sequence[UnitGroup]) -> list[tuple[str, int]]:
    """Groups whose projections lie inside a module, and how many of its two products follow them.

    All heads lose the same number of dimensions, in the queries and keys, the values, or both.
    """
    inside = [each for each in groups if each.name == path or each.name.startswith(f"{path}.")]
    heads = [(group.name, 2) for group in inside if group.kind == "head"]
    return heads[:1] or [(group.name, min(len(group.parts), 2)) for group in inside if group.parts]
