"""Iterative magnitude pruning: what is pruned, what is rewound, what stays."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from torchprune_bayes import geometric
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.schedules import halving
from torchprune_bayes.training import IterativeMagnitudePruning


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator)
    y = torch.randint(4, (40,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def made(model: nn.Module, **options):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    schedule = geometric(0.875, begin=0, end=3)
    return optimizer, IterativeMagnitudePruning(model, schedule, optimizer=optimizer, **options)


def test_rounds_prune_by_trained_weights_and_rewind_all_else():
    model = net()
    optimizer, pruner = made(model)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.02
    pruner.remember()
    early = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    early_state = optimizer.state_dict()["state"]
    moments = {i: state["exp_avg"].clone() for i, state in early_state.items()}
    kept = {"0.weight": torch.ones(10, 6).bool(), "3.weight": torch.ones(4, 10).bool()}
    for left in (50, 25, 12):
        train(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.5
        trained = {name: model.state_dict()[name].abs() * kept[name] for name in kept}
        pruner.prune_and_rewind()
        flat = torch.cat([value.flatten() for value in trained.values()])
        threshold = flat.topk(left).values[-1]
        kept = {name: value >= threshold for name, value in trained.items()}
        for name, mask in kept.items():
            assert torch.equal(pruner.masks[name], mask)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, early[name] * kept.get(name, torch.tensor(1)))
        assert optimizer.param_groups[0]["lr"] == 0.02
        for place, parameter in enumerate(model.parameters()):
            assert optimizer.state[parameter]["step"] == 2
            held = kept.get(list(dict(model.named_parameters()))[place])
            expected = moments[place] if held is None else moments[place] * held
            assert torch.equal(optimizer.state[parameter]["exp_avg"], expected)
    assert pruner.finished
    assert [event["step"] for event in pruner.history] == [1, 2, 3]
    assert pruner.sparsity == 0.88


def test_pruned_weights_stay_zero_while_training_goes_on():
    model = net()
    optimizer, pruner = made(model)
    pruner.remember()
    train(model, optimizer)
    pruner.prune_and_rewind()
    train(model, optimizer)
    for name, mask in pruner.masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].all()


def test_only_the_pruned_tensors_are_rewound_if_so_asked():
    model = net()
    optimizer, pruner = made(model, rewind="weights")
    pruner.remember()
    early = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, optimizer)
    late = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner.prune_and_rewind()
    for name, tensor in model.state_dict().items():
        mask = pruner.masks.get(name)
        assert torch.equal(tensor, late[name] if mask is None else early[name] * mask)
    assert optimizer.state[model[0].weight]["step"] == 4
    assert not torch.equal(late["1.running_mean"], early["1.running_mean"])


def test_follows_any_schedule_and_scope():
    model = net()
    pruner = IterativeMagnitudePruning(model, halving(0.9, begin=1, steps=1), scope="layer")
    pruner.remember()
    found = []
    while not pruner.finished:
        pruner.prune_and_rewind()
        found.append([int(mask.sum()) for mask in pruner.masks.values()])
    assert found == [[30, 20], [18, 12], [6, 4]]


def test_parameters_stay_the_same_objects():
    model = net()
    before = [id(parameter) for parameter in model.parameters()]
    optimizer, pruner = made(model)
    pruner.remember()
    train(model, optimizer)
    pruner.prune_and_rewind()
    assert [id(parameter) for parameter in model.parameters()] == before
    assert set(model.state_dict()) == set(net().state_dict())


def test_goes_on_in_a_fresh_process():
    model = net()
    optimizer, pruner = made(model)
    pruner.remember()
    train(model, optimizer)
    pruner.prune_and_rewind()
    saved = io.BytesIO()
    states = [model.state_dict(), optimizer.state_dict(), pruner.state_dict()]
    torch.save(states, saved)
    saved.seek(0)
    other = net(seed=5)
    other_optimizer, other_pruner = made(other)
    model_state, optimizer_state, state = torch.load(saved)
    other.load_state_dict(model_state)
    other_optimizer.load_state_dict(optimizer_state)
    other_pruner.load_state_dict(state)
    for one, its_optimizer, its_pruner in (
        (model, optimizer, pruner),
        (other, other_optimizer, other_pruner),
    ):
        train(one, its_optimizer)
        its_pruner.prune_and_rewind()
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert other_pruner.history == pruner.history


def test_refusals_come_before_changes():
    model = net()
    optimizer, pruner = made(model)
    with unchanged(model, optimizer), pytest.raises(ArgumentError, match="call of remember"):
        pruner.prune_and_rewind()
    with pytest.raises(ArgumentError, match="keys pruner and remembered"):
        pruner.load_state_dict({"step": 1})
    smaller = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    _, other = made(smaller)
    other.remember()
    with unchanged(model, optimizer), pytest.raises(AlignmentError, match=r"0\.weight"):
        pruner.load_state_dict(other.state_dict())
    with pytest.raises(ArgumentError, match="`rewind` to be one of"):
        made(net(), rewind="none")
