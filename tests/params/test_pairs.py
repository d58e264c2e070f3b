"""Pairs that know their model: names are the model's wherever a list of parameters goes."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

from tests.params.cases import tied, two_layers
from torchprune_bayes.errors import AlignmentError
from torchprune_bayes.params import ParameterPair, ParameterSpace, prunable_parameters

LISTS = {
    "listed": prunable_parameters,
    "filtered": lambda model: [pair for pair in prunable_parameters(model) if True],
    "wrapped": lambda model: prunable_parameters(nn.DataParallel(model)),
    "of a space": lambda model: ParameterSpace(model).pairs(),
    "with one by hand": lambda model: [prunable_parameters(model)[0], (model[2], "weight")],
}


@pytest.mark.parametrize("kind", LISTS)
def test_names_are_those_of_the_model_that_a_pair_knows(kind: str) -> None:
    model = two_layers()
    assert ParameterSpace.of_pairs(LISTS[kind](model)).names == ["0.weight", "2.weight"]


def test_pairs_that_know_no_common_model_are_named_by_their_place() -> None:
    model, other = two_layers(), two_layers()
    by_hand = [(model[0], "weight"), (model[0], "bias"), (model[2], "weight")]
    names = ["params[0].weight", "params[0].bias", "params[2].weight"]
    assert ParameterSpace.of_pairs(by_hand).names == names
    both = prunable_parameters(model)[:1] + prunable_parameters(other)[:1]
    assert ParameterSpace.of_pairs(both).names == ["params[0].weight", "params[1].weight"]


def test_a_pair_is_the_tuple_that_torch_takes() -> None:
    model = two_layers()
    (pair, *_) = prunable_parameters(model)
    assert isinstance(pair, ParameterPair)
    assert pair == (model[0], "weight")
    assert {(model[0], "weight"): 1}[pair] == 1
    for copied in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert type(copied) is tuple  # its module is a copy too, and in no model
        assert copied[1] == "weight"


def test_a_tied_tensor_counts_once_by_its_first_name() -> None:
    model = tied()
    pairs = [*prunable_parameters(model), (model[2], "weight"), (model[0], "weight")]
    assert ParameterSpace.of_pairs(pairs).names == ["1.weight", "2.weight"]


def test_layers_replaced_since_they_were_listed_are_refused() -> None:
    model = two_layers()
    pairs, space = prunable_parameters(model), ParameterSpace(model)
    space.check_in_model()
    model[0] = nn.Linear(4, 3)
    with pytest.raises(AlignmentError, match="list them again"):
        ParameterSpace.of_pairs(pairs)
    with pytest.raises(AlignmentError, match="layer `0` that the model had"):
        space.check_in_model()
