"""What the families share: strict checks of a block, and lists of its heads and hidden units.

In plain words: a block is read only if it is built of exactly the layers whose forward pass was
read when the family was written. Anything else, such as cross attention, adapters or hooks, is
refused with one sentence, because a wrongly wired model runs, trains, and is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ParameterError
from torchprune_bayes.structured.groups import AttributeRule, Kind, UnitGroup, UnitSlice

_CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True)
class Projection:
    """A matrix layer: which dimension of its weight is the output side, and its sizes.

    Attributes:
        name: Qualified name of the layer.
        outputs: Number of outputs.
        inputs: Number of inputs.
        output_dim: Dimension of the weight along the outputs; the inputs lie along the other of
            dimensions 0 and 1.
        has_bias: Whether there is a bias.
    """

    name: str
    outputs: int
    inputs: int
    output_dim: int
    has_bias: bool

    def rows(self, positions: Tensor) -> tuple[UnitSlice, ...]:
        """Return the slices of the weight and the bias that produce the units' output."""
        weight = UnitSlice(f"{self.name}.weight", self.output_dim, positions, "producer")
        if not self.has_bias:
            return (weight,)
        return (weight, UnitSlice(f"{self.name}.bias", 0, positions, "producer"))

    def columns(self, positions: Tensor) -> UnitSlice:
        """Return the slice of the weight that reads the units."""
        return UnitSlice(f"{self.name}.weight", 1 - self.output_dim, positions, "consumer")


def class_path(module: nn.Module) -> str:
    """Return the importable name of a module's class, such as ``"torch.nn.ReLU"``'s full path."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def join(prefix: str, name: str) -> str:
    """Return the qualified name of ``name`` inside ``prefix``."""
    return f"{prefix}.{name}" if prefix else name


def member(block: nn.Module, prefix: str, path: str, expected: str | Sequence[str]) -> nn.Module:
    """Return ``block.<path>``, refusing anything but the expected classes.

    Raises:
        ParameterError: If there is no such module or its class is another one.
    """
    expected = (expected,) if isinstance(expected, str) else tuple(expected)
    module: nn.Module | None = block
    for part in path.split("."):
        module = module._modules.get(part) if module is not None else None
    if module is None or class_path(module) not in expected:
        result = "nothing" if module is None else class_path(module)
        raise ParameterError(
            f"Expected `{join(prefix, path)}` to be a {' or '.join(expected)}, got {result}."
        )
    return module


def refuse(block: nn.Module, prefix: str, path: str, reason: str) -> None:
    """Refuse a block that has a submodule ``path`` other than an identity.

    Raises:
        ParameterError: If it has one.
    """
    module: nn.Module | None = block
    for part in path.split("."):
        module = module._modules.get(part) if module is not None else None
    if module is not None and not isinstance(module, nn.Identity):
        raise ParameterError(
            f"Expected no `{join(prefix, path)}`, since {reason}, got {type(module).__name__}."
        )


def size(module: nn.Module, name: str, attribute: str) -> int:
    """Return a positive whole number that the module's forward pass uses.

    Raises:
        ParameterError: If it is missing or no positive integer.
    """
    value = getattr(module, attribute, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ParameterError(
            f"Expected `{join(name, attribute)}` to be a positive int, got {value!r}."
        )
    return value


def projection(block: nn.Module, prefix: str, path: str) -> Projection:
    """Read the matrix layer ``block.<path>``: ``nn.Linear``, ``Conv1D`` or a 1x1 convolution.

    Raises:
        ParameterError: If it is of another class, is hooked or parametrized, or mixes positions.
    """
    layer = member(
        block,
        prefix,
        path,
        ("torch.nn.modules.linear.Linear", "torch.nn.modules.conv.Conv2d", _CONV1D),
    )
    name = join(prefix, path)
    weight = layer._parameters.get("weight")
    if weight is None:
        raise ParameterError(
            f"Expected `{name}.weight` to be a plain parameter, got a pruned or parametrized one; "
            "make it permanent first."
        )
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or tuple(weight.shape[2:]) != (1, 1)):
        raise ParameterError(
            f"Expected `{name}` to be a 1x1 convolution without groups, got {layer}."
        )
    output_dim = int(class_path(layer) == _CONV1D)
    has_bias = layer._parameters.get("bias") is not None
    return Projection(
        name, weight.shape[output_dim], weight.shape[1 - output_dim], output_dim, has_bias
    )


def spans(units: int, width: int, copies: int = 1) -> Tensor:
    """Return the positions of contiguous units with ``width`` entries each.

    Args:
        units: Number of units.
        width: Entries per unit.
        copies: Number of repetitions of the whole row of units, 3 for a fused query, key and value.

    Returns:
        Long tensor of shape (units, copies * width).

    Example:
        >>> spans(2, 2, copies=3)
        tensor([[ 0,  1,  4,  5,  8,  9],
                [ 2,  3,  6,  7, 10, 11]])
    """
    positions = torch.arange(copies * units * width).view(copies, units, width)
    return positions.transpose(0, 1).reshape(units, copies * width)


def group(
    name: str,
    kind: Kind,
    units: int,
    makers: Sequence[tuple[Projection, Tensor]],
    reader: tuple[Projection, Tensor],
    *,
    extra: Sequence[UnitSlice] = (),
    attributes: Sequence[AttributeRule] = (),
) -> UnitGroup:
    """Build a group from the layers that produce units and the one that reads them.

    Raises:
        ParameterError: If the units do not fill a layer's side exactly.
    """
    sides = [(layer, layer.outputs, "outputs", at) for layer, at in makers]
    sides.append((reader[0], reader[0].inputs, "inputs", reader[1]))
    for layer, result, side, positions in sides:
        if result != positions.numel():
            raise ParameterError(
                f"Expected `{layer.name}` to have {positions.numel()} {side} for {units} units of "
                f"{positions.shape[1]}, got {result}."
            )
    slices = [piece for layer, positions in makers for piece in layer.rows(positions)]
    slices += [*extra, reader[0].columns(reader[1])]
    return UnitGroup(name, kind, units, tuple(slices), tuple(attributes))


def hidden(
    makers: Sequence[Projection], reader: Projection, attributes: Sequence[AttributeRule] = ()
) -> UnitGroup:
    """Build the group of an MLP's hidden units; each unit is one row of every maker."""
    units = makers[0].outputs
    at = spans(units, 1)
    return group(
        makers[0].name,
        "hidden",
        units,
        [(maker, at) for maker in makers],
        (reader, at),
        attributes=attributes,
    )


def heads(
    makers: Sequence[Projection],
    reader: Projection,
    units: int,
    width: int,
    *,
    copies: int = 1,
    extra: Sequence[UnitSlice] = (),
    attributes: Sequence[AttributeRule] = (),
) -> UnitGroup:
    """Build the group of an attention's heads, each ``width`` outputs of every maker.

    Args:
        makers: The projections; a single fused one with ``copies=3``. The last one gives its name.
        reader: The output projection.
        units: Number of heads.
        width: Entries per head.
        copies: Number of repetitions of all heads in one maker.
        extra: Other slices that belong to the heads.
        attributes: Numbers that depend on the units.
    """
    at = spans(units, width, copies)
    return group(
        makers[-1].name,
        "head",
        units,
        [(maker, at) for maker in makers],
        (reader, spans(units, width)),
        extra=extra,
        attributes=attributes,
    )
