"""Structured importances by name."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured import UnitImportance, importances


def importances_by_name() -> dict[str, type[UnitImportance]]:
    """The importances that need only a calibration, by short names.

    Example:
        >>> importances_by_name()["opd"].__name__
        'OPDImportance'
    """
    kinds: dict[str, type[UnitImportance]] = {}
    for module in iter_modules(importances.__path__, f"{importances.__name__}."):
        for name, kind in vars(import_module(module.name)).items():
            if _needs_no_more(kind) and kind.__module__ == module.name:
                kinds[name.removesuffix("Importance").lower()] = kind
    return kinds


def importance_of(name: str, calibration: Calibration) -> UnitImportance:
    """Make an importance from its name and data.

    Raises:
        ArgumentError: If there is no such importance.
    """
    kinds = importances_by_name()
    if name not in kinds:
        raise ArgumentError(f"Expected one of {', '.join(sorted(kinds))}, got {name!r}.")
    kind = kinds[name]
    takes_it = "calibration" in inspect.signature(kind.__init__).parameters
    return kind(**({"calibration": calibration} if takes_it else {}))


def _needs_no_more(kind: Any) -> bool:
    if not (inspect.isclass(kind) and issubclass(kind, UnitImportance)) or inspect.isabstract(kind):
        return False
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(
        name in ("self", "calibration")
        or parameter.default is not parameter.empty
        or parameter.kind in variable
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
    )
