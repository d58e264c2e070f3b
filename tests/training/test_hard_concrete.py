"""Hard-concrete gates against their distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.training import HardConcreteGate, expected_l0

LOCATIONS = [-4.0, -1.0, 0.0, 0.7, 3.0]


def gate_at(locations: list[float], **options) -> HardConcreteGate:
    gate = HardConcreteGate(len(locations), **options).double()
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor(locations, dtype=torch.float64))
    return gate


def literal_gate(u: float, location: float, beta: float, low: float, high: float) -> float:
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + location) / beta))
    return min(1.0, max(0.0, s * (high - low) + low))


@pytest.mark.parametrize("temperature", [2 / 3, 1.5])
@pytest.mark.parametrize("stretch", [(-0.1, 1.1), (-0.5, 1.2)])
def test_samples_are_those_of_the_formula(temperature, stretch):
    gate = gate_at(LOCATIONS, temperature=temperature, stretch=stretch)
    uniform = torch.linspace(0.01, 0.99, 20, dtype=torch.float64).unsqueeze(1).expand(20, 5)
    found = gate.gate_at(uniform).tolist()
    for row, u in zip(found, uniform[:, 0].tolist(), strict=True):
        expected = [literal_gate(u, location, temperature, *stretch) for location in LOCATIONS]
        assert row == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("temperature", [2 / 3, 1.5])
@pytest.mark.parametrize("stretch", [(-0.1, 1.1), (-0.5, 1.2)])
def test_the_open_probability_is_the_measure_of_the_open_draws(temperature, stretch):
    gate = gate_at(LOCATIONS, temperature=temperature, stretch=stretch)
    # z grows with u, so the closed draws are an interval from 0; bisection finds its end.
    low, high = torch.zeros(5).double(), torch.ones(5).double()
    for _ in range(60):
        middle = (low + high) / 2
        closed = gate.gate_at(middle) == 0
        low, high = torch.where(closed, middle, low), torch.where(closed, high, middle)
    torch.testing.assert_close(gate.open_probability(), 1 - high, rtol=1e-10, atol=1e-12)


def test_expected_l0_weighs_the_probabilities():
    gate = gate_at(LOCATIONS, weights_per_unit=7)
    expected = sum(1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1) - a)) for a in LOCATIONS)
    assert gate.expected_l0().item() == pytest.approx(7 * expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(gate.expected_l0(), gate.log_alpha)
    p = gate.open_probability().detach()
    torch.testing.assert_close(gradient, 7 * p * (1 - p))


def test_eval_mode_is_deterministic_and_closes_units():
    gate = gate_at(LOCATIONS).eval()
    x = torch.ones(2, 5, dtype=torch.float64)
    before = torch.get_rng_state()
    expected = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in LOCATIONS]
    assert gate(x)[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert gate(x)[1, 0] == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_training_draws_one_gate_per_unit_or_per_sample():
    x = torch.ones(50, 4, 3)
    one = HardConcreteGate(4)(x)
    assert torch.equal(one, one[:1, :, :1].expand_as(one))
    many = HardConcreteGate(4, per_sample=True)(x)
    assert torch.equal(many, many[:, :, :1].expand_as(many))
    assert len(many[:, 0, 0].unique()) > 10


def test_draws_close_as_often_as_the_probability_says():
    gate = gate_at([-1.0, 0.0, 1.0], per_sample=True)
    torch.manual_seed(0)
    count = 20_000
    drawn = gate(torch.ones(count, 3, dtype=torch.float64)).detach()
    p = gate.open_probability().detach()
    error = (drawn != 0).double().mean(0) - p
    assert (error.abs() < 5 * (p * (1 - p) / count).sqrt()).all()


def test_gates_multiply_the_dimension_they_are_told():
    gate = gate_at([-9.0, 9.0], dim=2).eval()
    assert gate(torch.ones(1, 3, 2, dtype=torch.float64)).tolist() == [[[0.0, 1.0]] * 3]
    with pytest.raises(ArgumentError, match="2 units in dimension 2"):
        gate(torch.ones(1, 2, 3))
    with pytest.raises(ArgumentError, match="2 units in dimension 2"):
        gate(torch.ones(1, 2))


def test_the_first_location_is_the_keep_probability():
    torch.manual_seed(0)
    gate = HardConcreteGate(1000, keep_probability=0.8)
    assert torch.sigmoid(gate.log_alpha).mean().item() == pytest.approx(0.8, abs=1e-3)


def test_constrain_bounds_alpha():
    gate = gate_at([-50.0, 0.5, 50.0])
    gate.constrain()
    assert gate.log_alpha.exp().tolist() == pytest.approx([0.01, math.exp(0.5), 100.0])


def test_the_penalty_closes_what_the_loss_does_not_need():
    torch.manual_seed(0)
    gate, head = HardConcreteGate(6, keep_probability=0.7), nn.Linear(6, 1, bias=False)
    model = nn.Sequential(gate, head)
    x = torch.randn(256, 6)
    y = 2 * x[:, :1] - 2 * x[:, 1:2]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + 0.05 * expected_l0(model)).backward()
        optimizer.step()
        gate.constrain()
    assert (gate.eval().expected_gate() > 0).tolist() == [True, True, False, False, False, False]


def test_refuses_impossible_arguments():
    for options in (
        {"keep_probability": 1.0},
        {"keep_probability": 0.0},
        {"temperature": 0.0},
        {"stretch": (0.1, 1.1)},
        {"stretch": (-0.1, 1.0)},
        {"weights_per_unit": 0},
        {"dim": 0, "per_sample": True},
    ):
        with pytest.raises(ArgumentError):
            HardConcreteGate(3, **options)
    with pytest.raises(ArgumentTypeError, match="units"):
        HardConcreteGate(2.5)
    with pytest.raises(ArgumentError, match="HardConcreteGate modules"):
        expected_l0(nn.Linear(2, 2))
