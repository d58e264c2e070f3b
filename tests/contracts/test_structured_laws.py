"""Laws that hold for every registered structured method: whole units go, and never all of them."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.contracts.state import unchanged
from torchprune_bayes import registered_methods
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.gates import attach_gates
from torchprune_bayes.methods import find_method, prune_global

STRUCTURED = sorted(name for name, entry in registered_methods().items() if entry.is_structured)


def layer() -> nn.Linear:
    """Eight rows with gates, of which three have collapsed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = nn.Linear(5, 8)
    gate = attach_gates(found, ["*"])[""]
    with torch.no_grad():
        gate.mu[[1, 4, 6]] = torch.tensor([-18.0, -19.0, -18.5])
        gate.log_sigma[[1, 4, 6]] = 1.0
    return found


def live_rows(module: nn.Module) -> list[int]:
    mask: Tensor = module.get_buffer("weight_mask")
    assert torch.equal(mask, mask[:, :1].expand_as(mask)), "a row is cut in part"
    return mask[:, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", STRUCTURED)
def test_the_registry_says_what_the_class_says(name):
    entry = find_method(name)
    assert entry.method.PRUNING_TYPE == "structured"
    assert getattr(entry.method, "needs_calibration", False) == entry.needs_calibration
    assert entry.title
    assert entry.method.__doc__


@pytest.mark.parametrize("name", STRUCTURED)
def test_without_an_amount_it_stops_by_itself_and_again_nothing_goes(name):
    module = layer()
    find_method(name).method.apply(module, "weight")
    assert live_rows(module) == [0, 2, 3, 5, 7]
    find_method(name).method.apply(module, "weight")
    assert live_rows(module) == [0, 2, 3, 5, 7]


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize(("amount", "left"), [(0, 8), (1, 7), (0.25, 6), (0.99, 5), (8, 5)])
def test_an_amount_is_never_exceeded(name, amount, left):
    module = layer()
    find_method(name).method.apply(module, "weight", amount=amount)
    assert len(live_rows(module)) == left


@pytest.mark.parametrize("name", STRUCTURED)
def test_the_bias_goes_with_its_rows_and_the_rest_is_the_hosts(name):
    module = layer()
    find_method(name).method.apply(module, "weight")
    assert module.get_buffer("bias_mask").nonzero().flatten().tolist() == live_rows(module)
    x = torch.ones(2, 5)
    expected = module.eval()(x)
    assert not expected[:, [1, 4, 6]].any()
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
    for tensor in ("weight", "bias"):
        prune.remove(module, tensor)
    assert torch.equal(module(x), expected)
    assert not prune.is_pruned(module)


@pytest.mark.parametrize("name", STRUCTURED)
def test_failures_leave_everything_as_it_was(name):
    model = nn.Sequential(layer(), nn.Linear(8, 2))
    with unchanged(model), pytest.raises(ArgumentTypeError):
        find_method(name).method.apply(model[1], "weight")
    with unchanged(model), pytest.raises(ArgumentTypeError, match="unstructured method"):
        prune_global([(model[0], "weight")], name, amount=0.5)
