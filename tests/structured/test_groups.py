"""Lists of units: what may be kept."""

from __future__ import annotations

import pytest
import torch

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured.groups import UnitGroup, check_kept

GROUPS = [UnitGroup("a", "channel", 4, ()), UnitGroup("b", "head", 2, ())]


def test_any_distinct_units_may_be_kept_in_any_order():
    check_kept(GROUPS, {"a": torch.tensor([3, 0]), "b": torch.tensor([1])})
    check_kept(GROUPS, {})


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"c": torch.tensor([0])}, "the name of a group, got 'c'"),
        ({"a": torch.tensor([], dtype=torch.long)}, "at least one unit"),
        ({"a": torch.tensor([0.0])}, "at least one unit"),
        ({"a": torch.tensor([[0]])}, "at least one unit"),
        ({"a": torch.tensor([4])}, r"distinct units in \[0, 4\)"),
        ({"a": torch.tensor([-1])}, r"distinct units in \[0, 4\)"),
        ({"b": torch.tensor([1, 1])}, r"distinct units in \[0, 2\)"),
    ],
)
def test_units_that_do_not_exist_are_refused(kept, message):
    with pytest.raises(ArgumentError, match=message):
        check_kept(GROUPS, kept)


def test_names_are_distinct():
    with pytest.raises(ArgumentError, match="a name twice"):
        check_kept([GROUPS[0], GROUPS[0]], {})
