"""Measured loss curves: their points, their convex slopes, and their budget."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from tests.structured.models import build, images
from torchprune_bayes import Calibration
from torchprune_bayes.errors import ArgumentError, CalibrationError
from torchprune_bayes.structured import (
    LossCurve,
    apply_plan,
    find_groups,
    measure_curves,
    plan_of,
    repair,
)


def calibrated(name: str) -> Calibration:
    model, x = build(name).double(), images(12).double()
    return Calibration(
        model, [(x[:8], torch.arange(8) % 5), (x[8:], torch.arange(4))], cross_entropy
    )


@pytest.mark.parametrize("name", ["group norm", "transposed"])
def test_points_are_losses_of_the_repaired_model(name):
    calibration = calibrated(name)
    model = calibration.model
    groups = find_groups(model, images().double())
    orders = {group.name: torch.arange(group.units).flip(0) for group in groups}
    with unchanged(model):
        curves = measure_curves(calibration, groups, orders, evaluations=len(groups) * 2)
    assert [curve.group for curve in curves] == [group.name for group in groups]
    for curve, group in zip(curves, groups, strict=True):
        assert curve.removed == (0, round((group.units - 1) / 2), group.units - 1)
        last = {group.name: orders[group.name][-1:]}
        found = repair(calibration, [group], last, damping=1e-3)
        change = apply_plan(model, plan_of(model, [group], last), values=found.values)
        expected = sum(
            float(cross_entropy(model(x).detach(), y)) * len(x) for x, y in calibration.batches()
        )
        change.undo()
        assert curve.loss[-1] == pytest.approx(expected / 12)


def test_batch_norms_directly_behind_follow():
    calibration = calibrated("vgg")
    model = calibration.model
    groups = [g for g in find_groups(model, images().double()) if g.name == "0"]
    [curve] = measure_curves(calibration, groups, {"0": torch.arange(6)}, evaluations=1)
    found = repair(calibration, groups, {"0": torch.tensor([5])}, damping=1e-3)
    change = apply_plan(
        model, plan_of(model, groups, {"0": torch.tensor([5])}), values=found.values
    )
    loss = sum(
        float(cross_entropy(model(x).detach(), y)) * len(x) for x, y in calibration.batches()
    )
    change.undo()
    assert curve.loss[-1] == pytest.approx(loss / 12, rel=0.01)  # biased variance there


@st.composite
def curves(draw: st.DrawFn) -> LossCurve:
    units = draw(st.integers(1, 40))
    removed = sorted(draw(st.sets(st.integers(1, units), min_size=1, max_size=8)))
    value = st.floats(-2, 50) | st.just(math.inf)
    loss = draw(st.lists(value, min_size=len(removed), max_size=len(removed)))
    return LossCurve("g", units, (0, *removed), (1.0, *loss))


@given(curves())
def test_slopes_never_fall_and_are_those_of_a_convex_curve_below(curve):
    slopes: Tensor = curve.slopes()
    assert slopes.shape == (curve.units,)
    assert bool((slopes >= 0).all())
    assert bool((slopes.diff() >= -1e-9).all())
    highest = max(
        [max(v - 1.0, 0.0) / n for n, v in zip(curve.removed[1:], curve.loss[1:], strict=True)]
    )
    assert float(slopes[0]) <= highest + 1e-9 or math.isinf(highest)


def test_a_straight_line_has_one_slope():
    assert LossCurve("g", 6, (0, 2, 4, 6), (1.0, 2.0, 3.0, 4.0)).slopes().tolist() == [0.5] * 6


def test_the_budget_is_kept_and_shared():
    calibration = calibrated("vgg")
    model = calibration.model
    groups = find_groups(model, images().double())
    orders = {group.name: torch.arange(group.units) for group in groups}
    found = measure_curves(calibration, groups, orders, evaluations=8)
    assert [len(curve.removed) - 1 for curve in found] == [2, 2, 2]
    with unchanged(model), pytest.raises(ArgumentError, match="one evaluation for each of 3"):
        measure_curves(calibration, groups, orders, evaluations=2)
    assert measure_curves(calibration, groups, {}) == []
    assert len(measure_curves(calibration, groups, orders, evaluations=1, min_keep=8)) == 1


@pytest.mark.parametrize("wanted", [True, False])
def test_points_are_counted_in_a_progress_bar_if_it_is_wanted(wanted, capsys):
    model, x = build("vgg").double(), images(12).double()
    calibration = Calibration(model, [(x, torch.arange(12) % 5)], cross_entropy, progress=wanted)
    groups = find_groups(model, x[:2])
    orders = {group.name: torch.arange(group.units) for group in groups}
    measure_curves(calibration, groups, orders, evaluations=6)
    shown = capsys.readouterr().err
    assert ("6/6" in shown) == ("point" in shown) == wanted


def test_a_model_without_a_finite_loss_is_refused():
    calibration = calibrated("vgg")
    with torch.no_grad():
        calibration.model[9].bias.fill_(math.nan)
    groups = find_groups(calibration.model, images().double())
    orders = {group.name: torch.arange(group.units) for group in groups}
    with pytest.raises(CalibrationError, match="finite loss"):
        measure_curves(calibration, groups, orders)


@pytest.mark.parametrize(("layers", "samples"), [(1, 512), (8, 15360 // 56), (30, 256)])
def test_many_points_are_taken_on_fewer_samples(layers, samples):
    torch.manual_seed(0)
    hidden = [part for _ in range(layers) for part in (nn.Linear(9, 9), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(9, 3)).double()
    x, y = torch.randn(600, 9).double(), torch.arange(600) % 3
    calibration = Calibration(model, [(x, y)], cross_entropy)
    groups = find_groups(model, x[:1])
    orders = {group.name: torch.arange(group.units) for group in groups}
    curves = measure_curves(calibration, groups, orders)
    first = float(cross_entropy(model(x[:samples]).detach(), y[:samples]))
    assert [curve.loss[0] for curve in curves] == [pytest.approx(first)] * layers
