"""Options of methods, as they are typed in a shell."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

from torch.nn.utils.prune import BasePruningMethod

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods import find_method

# Given by the commands, or objects that cannot be typed in a shell.
_NOT_OPTIONS = {"self", "amount", "calibration", "curvature", "gate", "posterior"}


def options_of(method: type[BasePruningMethod]) -> dict[str, Any]:
    """Collect the options of a method with their defaults, those it passes on included.

    Example:
        >>> options_of(find_method("layer-magnitude").method)
        {'scope': 'layer'}
    """
    found: dict[str, Any] = {}
    for kind in method.__mro__:
        if "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
        passes_on = False
        for parameter in parameters:
            if parameter.kind is parameter.VAR_KEYWORD:
                passes_on = True
            elif parameter.name not in _NOT_OPTIONS:
                found.setdefault(parameter.name, parameter.default)
        if not passes_on:
            break
    return {name: default for name, default in found.items() if _takes(method, name, default)}


def _takes(method: Callable[..., Any], name: str, default: Any) -> bool:
    # A subclass may fix an option of its base class, which no signature tells.
    try:
        method(0.5, **{name: default})
    except TypeError:
        return False
    return True


def amount(text: str) -> float | int:
    """Read a fraction or a count.

    Example:
        >>> amount("0.9"), amount("5000")
        (0.9, 5000)
    """
    try:
        return int(text)
    except ValueError:
        return float(text)


def parsed_options(method: str, pairs: list[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs as options of a method.

    Args:
        method: Name of a registered method.
        pairs: Each a key and a Python literal; what is no literal is a string.

    Raises:
        ArgumentError: If a pair has no ``=`` or the method no such option.

    Example:
        >>> parsed_options("woodtaylor", ["steps=5", "damping=1e-3", "update=joint"])
        {'steps': 5, 'damping': 0.001, 'update': 'joint'}
    """
    known = options_of(find_method(method).method)
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ArgumentError(f"Expected an option as key=value, got {pair!r}.")
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise ArgumentError(f"Expected an option of {method} ({allowed}), got {key!r}.")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
