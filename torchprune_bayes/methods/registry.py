"""The registered pruning methods; a new method is a file with one decorated class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch.nn.utils.prune import BasePruningMethod

from torchprune_bayes.errors import ArgumentError

Method = TypeVar("Method", bound=type[BasePruningMethod])


@dataclass(frozen=True)
class RegisteredMethod:
    """A method and what one has to know to choose and to call it."""

    name: str
    method: type[BasePruningMethod]
    title: str
    paper: str
    needs_calibration: bool

    @property
    def is_structured(self) -> bool:
        """Whether it prunes whole units, so that calls over single weights refuse it."""
        return getattr(self.method, "PRUNING_TYPE", None) == "structured"


_METHODS: dict[str, RegisteredMethod] = {}


def register(
    name: str, *, title: str, paper: str, needs_calibration: bool = True
) -> Callable[[Method], Method]:
    """Class decorator that adds a method under ``name``, as the CLI and the tables show it.

    Args:
        name: Short name in lower case.
        title: One line of what it does.
        paper: arXiv number or reference.
        needs_calibration: Whether it takes ``calibration=``.

    Raises:
        ArgumentError: If the name is already registered.
    """

    def add(method: Method) -> Method:
        entry = RegisteredMethod(name, method, title, paper, needs_calibration)
        if name in _METHODS and not _is_executed_again(_METHODS[name], entry):
            raise ArgumentError(f"Expected a new method name, got {name!r}, which is registered.")
        _METHODS[name] = entry
        return method

    return add


def _is_executed_again(first: RegisteredMethod, second: RegisteredMethod) -> bool:
    # A test runner or a reload executes a module twice, which makes a second equal class.
    names = [(e.title, e.method.__module__, e.method.__qualname__) for e in (first, second)]
    return names[0] == names[1]


def registered_methods() -> dict[str, RegisteredMethod]:
    """All registered methods by name.

    Example:
        >>> registered_methods()["woodfisher"].paper
        'arXiv:2004.14340'
    """
    return dict(_METHODS)


def find_method(name: str) -> RegisteredMethod:
    """Look a method up by name.

    Raises:
        ArgumentError: If there is none of that name; the message lists the names.
    """
    if name not in _METHODS:
        raise ArgumentError(f"Expected one of {', '.join(sorted(_METHODS))}, got {name!r}.")
    return _METHODS[name]
