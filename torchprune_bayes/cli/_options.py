"""Options of methods, as typed in a shell or written in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentError as ParserError
from jsonargparse import ArgumentParser
from torch.nn.utils.prune import BasePruningMethod

from torchprune_bayes.cli._help import sentence
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods import find_method

# Given by the commands, or objects that cannot be typed in a shell.
_NOT_OPTIONS = {"amount", "calibration", "curvature", "gate", "posterior"}


def options_of(method: type[BasePruningMethod]) -> dict[str, Any]:
    """Collect the options of a method with their defaults, including those it passes on.

    Example:
        >>> options_of(find_method("layer-magnitude").method)
        {'scope': 'layer'}
    """
    return _parser(method).get_defaults().as_dict()


def checked_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read values as options of a method, by the types of its arguments.

    Args:
        method: Name of a registered method.
        given: Values by the names of options; strings, as from a shell, or plain values.

    Returns:
        The given options, each with the type that the method expects.

    Raises:
        ArgumentError: If the method has no such option or does not accept the value.

    Example:
        >>> checked_options("woodtaylor", {"steps": "5", "damping": "1e-3", "update": "joint"})
        {'steps': 5, 'damping': 0.001, 'update': 'joint'}
    """
    kind = find_method(method).method
    accepted = options_of(kind)
    for name in given:
        if name not in accepted:
            allowed = ", ".join(accepted) or "none"
            raise ArgumentError(f"Expected an option of {method} ({allowed}), got {name!r}.")
    try:
        parsed = _parser(kind).parse_object(dict(given)).as_dict()
    except ParserError as error:
        raise ArgumentError(f"{sentence(str(error))}, an option of {method}.") from error
    return {name: parsed[name] for name in given}


def _parser(method: type[BasePruningMethod]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(method, None, skip={*_NOT_OPTIONS}, fail_untyped=False)
    return parser
