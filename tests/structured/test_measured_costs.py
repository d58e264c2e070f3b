"""Costs that are measured: memory exactly, latency by a clock that the test turns."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from tests.contracts.state import unchanged
from tests.structured.models import build, images
from tests.structured.shrink_cases import Fixed, RowNorm
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured import (
    MeasuredCosts,
    UnitCosts,
    apply_plan,
    find_groups,
    measured_costs,
    plan_of,
    shrink,
)
from torchprune_bayes.structured.measured_costs import Repeated
from torchprune_bayes.wiring import forward


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers, and of the layer with the largest inputs and outputs."""
    sizes = []
    handles = [
        module.register_forward_hook(lambda _, args, out: sizes.append(args[0].nbytes + out.nbytes))
        for module in model.modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        model(images())
    for handle in handles:
        handle.remove()
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors) + max(sizes)


@pytest.mark.parametrize("name", ["resnet", "vgg", "transposed"])
def test_memory_is_that_of_the_shrunk_model(name):
    model = build(name)
    groups = find_groups(model, images())
    with unchanged(model):
        costs = MeasuredCosts("memory", model, groups, images())
        whole = costs.total("memory", {})
        left = {group.name: max(group.units // 2, 1) for group in groups}
        half = costs.total("memory", left)
    assert whole == held(model)
    kept = {name: torch.arange(count) for name, count in left.items()}
    apply_plan(model, plan_of(model, groups, kept))
    assert half == held(model)


def test_a_wanted_memory_is_reached_and_no_more():
    model, inputs = build("vgg"), images()
    whole = held(model)
    report = shrink(model, inputs, RowNorm(), sparsity=0.4, target="memory")
    assert report.measured is not None
    assert (report.measured.before, report.measured.after) == (whole, held(model))
    assert report.measured.sparsity >= 0.4
    assert f"{report.measured} bytes" in str(report)


@pytest.fixture
def slow_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass takes one second, and one for each output channel of the second layer."""
    now = [0.0]
    run = forward.run

    def timed(model, inputs, forward_fn=None):
        now[0] += 1.0 + model[3].out_channels
        return run(model, inputs, forward_fn)

    monkeypatch.setattr(measured_costs, "run", timed)
    for clock in ("perf_counter", "process_time"):  # of several threads, and of one
        monkeypatch.setattr(time, clock, lambda: now[0])


def test_latency_goes_where_it_is_spent(slow_layers):
    model, inputs = build("vgg"), images()
    groups = find_groups(model, inputs)
    costs = MeasuredCosts("latency", model, groups, inputs)
    assert costs.total("latency", {}) == pytest.approx(9e9)
    assert costs.total("latency", {"3": 4}) == pytest.approx(5e9)
    prices = costs.prices({group.name: group.units for group in groups})
    assert prices["3"] == pytest.approx(1e9)
    assert prices["0"] == prices["7"] == pytest.approx(9e9 / 24 / 1000)

    class Joint(Fixed):
        joint = True

    dense = copy.deepcopy(model)
    scores = {group.name: torch.ones(group.units) for group in groups}
    report = shrink(model, inputs, Joint(scores), sparsity=0.4, target="latency")
    assert (model[0].out_channels, model[3].out_channels, model[7].out_features) == (6, 4, 10)
    assert report.measured is not None
    assert report.measured.sparsity == pytest.approx(4 / 9)
    assert dense[3].out_channels == 8


def test_a_latency_is_reported_from_a_measurement_of_its_own(slow_layers, monkeypatch, caplog):
    model, inputs = build("vgg"), images()
    lucky, latency = [0.5], MeasuredCosts._latency
    monkeypatch.setattr(
        MeasuredCosts,
        "_latency",
        lambda *args: Repeated(*(lucky[0] * value for value in latency(*args))),
    )
    anew = MeasuredCosts.anew
    monkeypatch.setattr(
        MeasuredCosts, "anew", lambda *args: (lucky.__setitem__(0, 1.0), anew(*args))[1]
    )
    report = shrink(model, inputs, RowNorm(), sparsity=0.3, target="latency")
    assert report.measured is not None
    assert report.measured.after == round(1e9 * (1.0 + model[3].out_channels))
    assert "Asked for a latency 30 % smaller" in caplog.text
    assert f"measured anew it is {report.measured.sparsity:.0%}".replace("%", " %") in caplog.text


@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_passes_that_differ_much_are_told(slow_layers, monkeypatch, caplog, spread):
    latency = MeasuredCosts._latency

    def spread_out(*args):
        value = latency(*args).value
        return Repeated(value, (1 - spread / 2) * value, (1 + spread / 2) * value)

    monkeypatch.setattr(MeasuredCosts, "_latency", spread_out)
    report = shrink(build("vgg"), images(), RowNorm(), sparsity=0.3, target="latency")
    assert report.spread == pytest.approx(spread)
    assert f"half of the passes within {spread:.0%}" in str(report)
    assert ("measure on an idle machine" in caplog.text) == (spread > 0.1)


def test_quartiles_are_those_of_the_pairs():
    model = build("vgg")
    costs = MeasuredCosts("latency", model, find_groups(model, images()), images())
    ratios = [0.5, 0.1, 0.9, 0.7, 0.3, 0.6, 0.2, 0.8, 0.4]
    seconds = iter([each for ratio in ratios for each in (ratio, 1.0)])
    costs._seconds, costs._whole = lambda: next(seconds), 2.0
    assert costs.anew({}) == pytest.approx((1e9, 0.6e9, 1.4e9))
    assert Repeated(2.0, 1.5, 2.5).spread == 0.5


def test_a_latency_that_cannot_be_had_names_what_would_help(slow_layers):
    model = build("vgg")
    with unchanged(model), pytest.raises(ArgumentError, match=r"still takes 22% .* larger inputs"):
        shrink(model, images(), RowNorm(), sparsity=0.9, target="latency")


def test_what_cannot_be_measured_is_refused():
    model = build("vgg")
    groups = find_groups(model, images())
    with unchanged(model), pytest.raises(ArgumentError, match="to measure latency with"):
        shrink(model, None, RowNorm(), sparsity=0.3, target="latency", groups=groups, verify=False)
    with pytest.raises(ArgumentError, match="`resource` to be one of 'memory'"):
        MeasuredCosts("memory", model, groups, images()).total("latency", {})
    with pytest.raises(ArgumentError, match="`resource` to be one of 'params'"):
        UnitCosts.measure(model, groups).total("memory", {})
