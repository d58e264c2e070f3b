"""Gate decorators with ticks and tocks, and hard-concrete gates, to the cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured import LargestWeightImportance, shrink
from torchprune_bayes.training import (
    TickTock,
    attach_l0_gates,
    expected_l0,
    fold_l0_gates,
)

X = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10), nn.ReLU()),
        *(nn.Conv2d(10, 10, 3), nn.BatchNorm2d(10), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 3)),
    )


def an_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, penalty) -> None:
    model.train()
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        optimizer.zero_grad()
        (cross_entropy(model(x), y) + penalty()).backward()
        optimizer.step()


def test_ticks_train_gates_alone_tocks_all_and_what_is_closed_is_cut():
    model = net()
    tick_tock = TickTock(model, 0.5, increment=0.2, tick=2, tock=1, strength=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        if tick_tock.phase == "done":
            break
        phase, before = tick_tock.phase, model[0].weight.detach().clone()
        with tick_tock.epoch():
            assert (tick_tock.penalty() > 0) == (phase == "tock")
            an_epoch(model, optimizer, tick_tock.penalty)
        assert torch.equal(model[0].weight, before) == (phase == "tick")
    phases = [event["phase"] for event in tick_tock.history]
    assert phases == ["tick", "tick", "tock", "tick", "tick"]
    closed = [event["closed"] for event in tick_tock.history]
    assert closed == pytest.approx([0.0, 0.2, 0.2, 0.4, 0.5])  # 1, 21, 41 % of 20, then all
    model.eval()
    expected = model(X)
    report = tick_tock.cut(X[:2])
    assert report.units.after == 10
    assert not [m for m in model.modules() if type(m).__name__ == "GateDecorator"]
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="after the last"), tick_tock.epoch():
        pass


def test_an_epoch_that_fails_closes_nothing_and_lets_all_weights_go():
    model = net()
    tick_tock = TickTock(model, 0.5)
    with pytest.raises(RuntimeError, match="no data"), tick_tock.epoch():
        raise RuntimeError("no data")
    assert tick_tock.closed == 0.0
    assert tick_tock.history == []
    assert model[0].weight.requires_grad
    assert not model[1].norm.weight.requires_grad  # the gate stands for it


@pytest.mark.parametrize(
    "options", [{"sparsity": 1.0}, {"increment": 0.0}, {"tick": 0}, {"tock": 0}, {"strength": 0.0}]
)
def test_wrong_options_leave_the_model_as_it_is(options):
    model = net()
    with pytest.raises(ArgumentError):
        TickTock(model, **{"sparsity": 0.5, **options})
    assert type(model[1]) is nn.BatchNorm2d


def test_l0_gates_are_counted_folded_and_cut():
    model = net()
    gates = attach_l0_gates(model, X[:2])
    assert sum(gate.log_alpha.numel() for gate in gates) == 20
    assert expected_l0(model).item() < 10 * 9 + 10 * 90
    with torch.no_grad():
        gates[0].log_alpha[:4] = 5.0  # far from closing
    optimizer = torch.optim.Adam(model.parameters(), lr=0.2)
    for _ in range(6):
        an_epoch(model, optimizer, lambda: 0.01 * expected_l0(model))
        for gate in gates:
            gate.constrain()
    model.eval()
    scales = [gate.expected_gate() for gate in gates]
    expected, closed = model(X), sum(int((scale == 0).sum()) for scale in scales)
    assert 0 < closed < 20
    assert fold_l0_gates(model) == closed
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    before = model(X)
    report = shrink(model, X[:2], LargestWeightImportance("any", 1e-12), target="evidence")
    each = [int((scale == 0).sum()) for scale in scales]
    assert [g.units.before - g.units.after for g in report.groups] == [min(n, 9) for n in each]
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
    assert all("gate" not in name for name in model.state_dict())


def test_l0_gates_before_a_linear_layer_share_the_entries_of_a_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2)).eval()
    gates = attach_l0_gates(model)
    assert [gate.log_alpha.numel() for gate in gates] == [3]
    with torch.no_grad():
        gates[0].log_alpha.copy_(torch.tensor([-9.0, 0.0, 9.0]))
    expected = model(X)
    assert fold_l0_gates(model) == 1
    torch.testing.assert_close(model(X), expected)
    assert not model[0]._forward_hooks
    assert not model[3]._forward_pre_hooks


def test_l0_gates_are_attached_once_and_folded_once():
    model = net()
    with pytest.raises(ArgumentError, match="got one without"):
        fold_l0_gates(model)
    attach_l0_gates(model, X[:2])
    with pytest.raises(ArgumentError, match="one that has some"):
        attach_l0_gates(model, X[:2])
