"""What the tests of the documentation share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torchprune_bayes.methods import registry


@pytest.fixture
def restored_registry() -> Iterator[None]:
    """Methods that a page registers are gone after it."""
    before = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)
