"""A place for a gate, and what a gate there scales."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torchprune_bayes.layer_kinds import Side, kind_of


@dataclass(frozen=True)
class Site:
    """A place for a gate.

    Attributes:
        module: Qualified name of the layer or batch norm that holds the gate.
        side: Whether the gate scales its output or its input.
        units: Number of gates.
        repeat: Neighbouring entries that share one.
        kind: ``"hidden"``, ``"channel"`` or ``"head"``.
        producer: Qualified name of the layer whose weights produce the units, if known.
    """

    module: str
    side: Side
    units: int
    repeat: int = 1
    kind: str = "hidden"
    producer: str | None = None

    @property
    def name(self) -> str:
        """The module's name, with ``":in"`` where the gate scales its input."""
        return self.module if self.side == "out" else f"{self.module}:in"


def entries_of(module: nn.Module, side: Side) -> int | None:
    """How many entries a gate on a module has; ``None`` where no gate fits.

    A gate fits where it can be folded: behind linear layers, convolutions and affine batch norms,
    and in front of linear layers and convolutions without groups.
    """
    return kind_of(module).gate_entries(module, side)


def weight_dim(module: nn.Module, side: Side) -> int:
    """Dimension of ``module.weight`` that a gate on this side scales."""
    return kind_of(module).weight_dim(side)


def activation_dim(module: nn.Module) -> int:
    """Dimension of a module's activations that holds the units."""
    return kind_of(module).units_dim
