"""Optional packages: a missing one is an error that names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torchprune_bayes.errors import MissingExtraError


@contextmanager
def optional(package: str, extra: str) -> Iterator[None]:
    """Turn an ``ImportError`` inside the ``with`` block into one that says what to install.

    Raises:
        MissingExtraError: If an import in the block fails.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f"Expected {package} to be installed, got an import error ({error}); "
            f'run `pip install "torchprune_bayes[{extra}]"`.'
        ) from error
