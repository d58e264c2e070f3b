"""Timing two models in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.state import unchanged
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.reports.speed import Speed, compare_speed


class Timed(nn.Module):
    """Takes a number of seconds by a clock of its own."""

    def __init__(self, clock: list[float], takes: list[float], order: list[str], name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.clock, self.takes, self.name = clock, takes, name
        self.note = order.append  # a list of the module would be as before after a run

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.clock[0] += self.takes.pop(0)
        self.note(self.name)
        return (x * self.weight).requires_grad_(False)


@pytest.fixture(params=[1, 2])
def clock(request, monkeypatch) -> list[float]:
    """The clock of the process where there is one thread, else that of the machine."""
    now = [0.0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    name = "process_time" if request.param == 1 else "perf_counter"
    monkeypatch.setattr(f"time.{name}", lambda: now[0])
    return now


def test_ratios_are_those_of_neighbours_and_the_models_take_turns(clock):
    order: list[str] = []
    # The machine is ten times as slow in the second pair, which no ratio shows.
    before = Timed(clock, [7.0, 2.0, 20.0, 3.0], order, "before").train()
    after = Timed(clock, [7.0, 1.0, 10.0, 1.0], order, "after")
    found = compare_speed(before, after, torch.ones(1), pairs=3)
    assert found == Speed(3000.0, 1000.0, 2.0, 2.0, 3.0)
    assert str(found) == "3e+03 -> 1e+03 ms (2.00x, 2.00 to 3.00)"
    assert order == ["before", "after", "before", "after", "after", "before", "before", "after"]
    assert before.training


def test_ratios_on_both_sides_of_one_are_said_to_tell_nothing():
    speed = Speed(2.0, 1.9, 1.04, 0.8, 1.4)
    assert not speed.conclusive
    assert str(speed).endswith(
        "(1.04x, 0.80 to 1.40: no measurable difference, time more or larger batches)"
    )
    assert Speed(2.0, 1.0, 2.0, 1.1, 2.1).conclusive
    assert Speed(2.0, 3.0, 0.7, 0.6, 0.9).conclusive


def test_models_stay_and_inputs_have_three_forms():
    models = [nn.Bilinear(2, 2, 3), nn.Bilinear(2, 2, 1)]
    x = torch.ones(4, 2)
    with unchanged(models[0]), unchanged(models[1]):
        for inputs in ((x, x), {"input1": x, "input2": x}):
            assert compare_speed(*models, inputs, pairs=1).speedup > 0
        assert compare_speed(*models, x, pairs=1, forward_fn=lambda m, x: m(x, x)).speedup > 0
    assert all(parameter.grad is None for model in models for parameter in model.parameters())


def test_impossible_arguments():
    model = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="`pairs`"):
        compare_speed(model, model, torch.ones(1, 2), pairs=0)
    with pytest.raises(ArgumentTypeError, match="`example_inputs`"):
        compare_speed(model, model, "text")
