"""Gates go into models of every family, survive copies and checkpoints, and change nothing else."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.gates.cases import FAMILIES, built, mlp, scatter
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError, ParameterError
from torchprune_bayes.gates import Site, attach_gates, gates_of


@pytest.mark.parametrize("family", FAMILIES)
def test_preserve_leaves_the_output(family):
    model, x = built(family)
    before = model(x)
    gates = attach_gates(model, preserve=True)
    assert gates.units > 0
    assert not any(gate.training for gate in gates.values())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_act_and_learn(family):
    model, x = built(family)
    gates = attach_gates(model)
    before = model(x)
    scatter(gates)
    assert not torch.allclose(model(x), before)
    model.train()
    assert not torch.equal(model(x), model(x))
    (model(x).square().sum() + gates.kl()).backward()
    for parameter in gates.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_attaching_draws_no_random_numbers_and_leaves_everything_else():
    model = mlp()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    attach_gates(model)
    assert torch.equal(torch.get_rng_state(), before)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    added = set(after) - set(state)
    assert added == {
        f"{layer}.noise_gate_in.{name}" for layer in (2, 4) for name in ("mu", "log_sigma", "mask")
    }


def test_copies_use_their_own_gates():
    model, x = built("lenet")
    scatter(attach_gates(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))
        gates = gates_of(twin)
        for gate in gates.values():
            gate.close(torch.ones(gate.units, dtype=torch.bool))
        assert not torch.allclose(twin(x), model(x))
        assert gates_of(model).closed < gates_of(model).units


def test_checkpoints():
    model, x = built("vgg")
    scatter(attach_gates(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other, _ = built("vgg")
    attach_gates(other)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), model(x))


def test_gates_are_found_in_wrappers_and_parts():
    model = mlp()
    gates = attach_gates(nn.DataParallel(model))
    assert list(gates_of(nn.DataParallel(model))) == list(gates) == ["2:in", "4:in"]
    part = gates_of(nn.Sequential(model[2]))
    assert list(part) == ["0:in"]
    assert part.sites["0:in"].producer is None


def test_sites_by_pattern_and_by_hand():
    model, x = built("vgg")
    gates = attach_gates(model, ["[14]", Site("8", "in", 5, kind="channel", producer="3")])
    assert list(gates) == ["1", "4", "8:in"]
    assert [site.kind for site in gates.sites.values()] == ["channel", "channel", "channel"]
    assert model(x).shape == (2, 3)


def test_a_gate_on_both_sides_of_a_layer():
    model, x = built("mlp")
    gates = attach_gates(model, [Site("2", "in", 5), Site("2", "out", 4)])
    scatter(gates)
    torch.testing.assert_close(
        model(x),
        model[4](
            (model[2].weight @ (model[1](model[0](x)) * gates["2:in"].scale().float()).T)
            .T.add(model[2].bias)
            .mul(gates["2"].scale().float())
            .relu()
        ),
    )


@pytest.mark.parametrize(
    ("sites", "error", "message"),
    [
        ("gpt2", ArgumentError, "got none in Sequential"),
        ("gpt3", ArgumentError, "Expected one of auto"),
        ([], ArgumentError, "at least one site"),
        (["fc*"], ArgumentError, r"match 'fc\*', got none"),
        ([3], ArgumentTypeError, "sites or patterns"),
        ([Site("9", "in", 5)], ArgumentError, "site in the model, got '9'"),
        ([Site("2", "in", 4)], ArgumentError, "gate of 5 entries at `2:in`"),
        ([Site("1", "out", 5)], ArgumentError, "gate of no entries at `1`, a Tanh"),
        ([Site("2", "in", 5)] * 2, ArgumentError, "several at 2:in"),
    ],
)
def test_sites_that_do_not_fit_are_refused_before_anything_is_changed(sites, error, message):
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        attach_gates(model, sites, preserve=True)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not model[2]._forward_pre_hooks


def test_a_wrong_option_of_the_gates_changes_nothing():
    model = mlp()
    with pytest.raises(ArgumentError, match="`noise`"):
        attach_gates(model, noise="token")
    assert not any("noise_gate" in name for name in model.state_dict())


def test_gates_are_attached_once():
    model = mlp()
    attach_gates(model)
    with pytest.raises(ArgumentError, match="several at 2:in, 4:in"):
        attach_gates(model)


def test_a_shared_weight_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(ParameterError, match=r"shared by 0\.weight, 2\.weight"):
        attach_gates(model)


def test_a_model_without_gates():
    with pytest.raises(ArgumentError, match="got none in Sequential"):
        gates_of(mlp())
