"""Optional packages: a missing one is an error that names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from torchprune_bayes.errors import MissingExtraError


@contextmanager
def optional(package: str, extra: str) -> Iterator[None]:
    """Turn an ``ImportError`` inside the ``with`` block into one that says what to install.

    Args:
        package: What the block imports, as the message names it.
        extra: Extra of this project that brings it.

    Raises:
        MissingExtraError: If an import in the block fails.

    Example:
        >>> with optional("the moon", "moon"):
        ...     import moon_that_is_not_installed
        Traceback (most recent call last):
        torchprune_bayes.errors.MissingExtraError: Expected the moon to be installed, got no module
        named 'moon_that_is_not_installed'; in a checkout of torchprune_bayes run
        `python -m pip install ".[moon]"`.
    """
    try:
        yield
    except ImportError as error:
        reason = str(error)[:1].lower() + str(error)[1:]
        raise MissingExtraError(
            f"Expected {package} to be installed, got {reason}; "
            f'in a checkout of torchprune_bayes run `python -m pip install ".[{extra}]"`.'
        ) from error


def require(package: str, extra: str) -> None:
    """Check that a package can be imported, without importing it.

    Raises:
        MissingExtraError: If it cannot.
    """
    with optional(package, extra):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}")
