"""Looking methods up, and adding them."""

from __future__ import annotations

import pytest
from torch.nn.utils.prune import RandomUnstructured

from torchprune_bayes import registered_methods
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods import Magnitude, find_method, register


def test_methods_are_found_by_name():
    assert find_method("magnitude").method is Magnitude
    assert find_method("random").method is RandomUnstructured


def test_an_unknown_name_is_answered_with_all_names():
    with pytest.raises(ArgumentError, match=r"layer-magnitude, .*random.*, got 'l1'"):
        find_method("l1")


def test_a_name_is_given_once():
    with pytest.raises(ArgumentError, match="which is registered"):
        register("random", title="again", paper="")(RandomUnstructured)
    assert find_method("random").title == "uniformly at random"


def test_the_registry_itself_cannot_be_changed_by_its_readers():
    registered_methods().clear()
    assert "magnitude" in registered_methods()
