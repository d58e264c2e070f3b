"""Gate decorators: the same function, Taylor scores by autograd and by closing, folding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.training import (
    GateDecorator,
    close_gates,
    collect_scores,
    decorate_norms,
    fold_gates,
    gate_penalty,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), inner, nn.Flatten(), nn.Linear(5, 3)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean = torch.randn(module.num_features)
            module.running_var = 0.5 + torch.rand(module.num_features)
    return model.double()


def data():
    torch.manual_seed(1)
    return torch.randn(8, 2, 5, 5, dtype=torch.float64), torch.randint(3, (8,))


@pytest.mark.parametrize("training", [True, False])
def test_decorating_and_folding_leave_the_function(training):
    model, (x, _) = net().train(training), data()
    with torch.no_grad():
        model[1].weight[2] = 0.0  # a channel that is its shift alone
    expected = copy.deepcopy(model)(x)
    gates = decorate_norms(model)
    assert [gate.training for gate in gates] == [training] * 2
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-10, atol=1e-12)
    fold_gates(model)
    assert not any(isinstance(module, GateDecorator) for module in model.modules())
    assert model[1].weight.requires_grad
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_scores_are_the_absolute_slopes_summed_over_batches():
    model, (x, y) = net().eval(), data()
    gates = decorate_norms(model)
    with collect_scores(gates):
        for part in (slice(0, 3), slice(3, 8)):
            model.zero_grad()
            cross_entropy(model(x[part]), y[part]).backward()
    found = [gate.scores.clone() for gate in gates]
    expected = [torch.zeros_like(score) for score in found]
    for part in (slice(0, 3), slice(3, 8)):
        loss = cross_entropy(model(x[part]), y[part])
        slopes = torch.autograd.grad(loss, [gate.gate for gate in gates])
        for total, slope, gate in zip(expected, slopes, gates, strict=True):
            total += (slope * gate.gate.detach()).abs()
    for score, total in zip(found, expected, strict=True):
        torch.testing.assert_close(score, total, rtol=1e-12, atol=0)


def test_a_score_is_the_first_order_change_of_the_loss():
    model, (x, y) = net().eval(), data()
    gates = decorate_norms(model)
    with collect_scores(gates):
        cross_entropy(model(x), y).backward()
    step = 1e-6
    for gate in gates:
        for unit in range(len(gate.gate)):
            losses = []
            for sign in (1, -1):
                twin = copy.deepcopy(model)
                twin_gate = twin.get_submodule(_name_of(model, gate))
                with torch.no_grad():
                    twin_gate.gate[unit] *= 1 + sign * step
                    losses.append(cross_entropy(twin(x), y).item())
            slope = abs(losses[0] - losses[1]) / (2 * step)
            assert gate.scores[unit].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def test_collecting_ends_with_its_block():
    model, (x, y) = net().eval(), data()
    gates = decorate_norms(model)
    with pytest.raises(ValueError, match="batch_size"), collect_scores(gates):
        cross_entropy(model(x), y[:0]).backward()
    before = [gate.scores.clone() for gate in gates]
    cross_entropy(model(x), y).backward()
    assert all(torch.equal(gate.scores, old) for gate, old in zip(gates, before, strict=True))


def test_closing_is_exact_global_and_keeps_some_in_each_norm():
    gates = decorate_norms(net())
    gates[0].scores.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    gates[1].scores.copy_(torch.tensor([9.0, 0.25, 8.0, 7.0, 6.0]))
    assert [mask.tolist() for mask in close_gates(gates, 3)] == [
        [False, False, True, True],
        [True, False, True, True, True],
    ]
    close_gates(gates, 0.5, min_open=1)  # 3 of 6
    assert [gate.open.tolist() for gate in gates] == [
        [False, False, False, True],
        [True, False, True, False, False],
    ]
    with pytest.raises(ArgumentError, match="at most 3"):
        close_gates(gates, 4)


def test_a_closed_gate_takes_the_channel_and_its_shift_away():
    model, (x, y) = net().train(), data()
    gates = decorate_norms(model)
    gates[0].scores[1] = -1.0
    close_gates(gates, 1)
    hidden = model[:2](x)
    assert not hidden[:, 1].any()
    with collect_scores(gates):
        cross_entropy(model(x), y).backward()
    assert gates[0].gate.grad[1] == 0
    model.eval()
    expected = model(x)
    fold_gates(model)
    torch.testing.assert_close(model(x), expected)
    assert (model[1].weight[1], model[1].bias[1]) == (0, 0)


def test_the_penalty_is_the_sum_of_open_gates_and_has_a_gradient():
    gates = decorate_norms(net())
    gates[0].scores[1] = -1.0
    close_gates(gates, 1)
    expected = sum((gate.gate * gate.open).abs().sum().item() for gate in gates)
    penalty = gate_penalty(gates)
    assert penalty.item() == pytest.approx(expected)
    penalty.backward()
    assert torch.equal(gates[0].gate.grad, gates[0].gate.sign() * gates[0].open)


def test_a_shared_norm_has_one_gate():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm)
    gates = decorate_norms(model)
    assert len(gates) == 1
    assert model[1] is model[3]
    fold_gates(model)
    assert model[1] is model[3] is norm


def test_the_state_goes_into_state_dict():
    model, twin = net(), net()
    gates = decorate_norms(model)
    gates[0].scores[1] = -1.0
    close_gates(gates, 1)
    decorate_norms(twin)
    twin.load_state_dict(model.state_dict())
    assert twin[1].open.tolist() == [True, False, True, True]


def test_refusals_come_before_changes():
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="batch norms inside"):
        decorate_norms(plain)
    with pytest.raises(ArgumentTypeError, match="batch norm, got Linear"):
        GateDecorator(plain[0])
    with pytest.raises(ArgumentError, match="at least one gate"):
        close_gates([], 1)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    gates = decorate_norms(model)
    with unchanged(model), pytest.raises(ArgumentError, match="affine=True"):
        fold_gates(model)
    gates[0].gate.requires_grad_(False)
    gates[1].scores.fill_(1.0)
    with pytest.raises(ArgumentError, match="require gradients"), collect_scores(gates):
        pass
    assert gates[1].scores.tolist() == [1.0, 1.0]
