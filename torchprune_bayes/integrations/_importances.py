"""Structured importances by name."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured import UnitGroup, UnitImportance, importances


class MagnitudeImportance(UnitImportance):
    """The squared norm of all weights that make or read a unit; the baseline."""

    def __init__(self, calibration: Calibration | None = None) -> None:
        super().__init__()

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor:
        """Sum the squares over the unit's rows and columns."""
        total = torch.zeros(group.units)
        for piece in group.slices:
            if piece.role == "norm":
                continue
            squares = model.get_parameter(piece.name).detach().square()
            along = squares.movedim(piece.dim, 0).flatten(1).sum(1) if squares.ndim > 1 else squares
            total = total + along.float().cpu()[piece.positions].sum(1)
        return total


def importances_by_name() -> dict[str, type[UnitImportance]]:
    """The importances that need no more than a calibration, by short names.

    Example:
        >>> importances_by_name()["opd"].__name__
        'OPDImportance'
    """
    found: dict[str, type[UnitImportance]] = {"magnitude": MagnitudeImportance}
    for module in iter_modules(importances.__path__, f"{importances.__name__}."):
        for name, kind in vars(import_module(module.name)).items():
            if _takes_calibration(kind) and kind.__module__ == module.name:
                found[name.removesuffix("Importance").lower()] = kind
    return found


def importance_of(name: str, calibration: Calibration) -> UnitImportance:
    """Make an importance from its name and data.

    Raises:
        ArgumentError: If there is none of that name.
    """
    known = importances_by_name()
    if name not in known:
        raise ArgumentError(f"Expected one of {', '.join(sorted(known))}, got {name!r}.")
    return known[name](calibration=calibration)  # type: ignore[call-arg]


def _takes_calibration(kind: Any) -> bool:
    if not (inspect.isclass(kind) and issubclass(kind, UnitImportance)) or inspect.isabstract(kind):
        return False
    known = inspect.signature(kind.__init__).parameters
    needed = [
        p for n, p in known.items() if p.default is p.empty and n not in ("self", "calibration")
    ]
    return "calibration" in known and all(
        p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in needed
    )
