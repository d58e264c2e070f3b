"""What units of different groups are compared by."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from tests.structured.models import build, images
from tests.structured.shrink_cases import Fixed, RowNorm
from torchprune_bayes import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.structured import (
    ConsumerGateFisherImportance,
    find_groups,
    shrink,
)
from torchprune_bayes.structured.allocation import isomorphic_ranks, per_price, unit_prices
from torchprune_bayes.structured.unit_costs import UnitCosts


def calibrated(model: nn.Module) -> Calibration:
    x = images(64)
    return Calibration(model, [(x, model(x).detach().argmax(1))], cross_entropy)


@pytest.mark.parametrize("resource", ["params", "flops", "channels"])
def test_prices_are_what_one_unit_less_saves(resource):
    model, inputs = build("resnet"), images()
    groups = find_groups(model, inputs)
    costs = UnitCosts.measure(model, groups, inputs)
    for name, price in unit_prices(costs, groups, resource).items():
        units = next(group.units for group in groups if group.name == name)
        assert price == costs.total(resource, {}) - costs.total(resource, {name: units - 1})


def test_units_that_cost_nothing_are_never_worth_removing():
    found = per_price({"a": torch.tensor([1.0, 3.0]), "b": torch.ones(1)}, {"a": 2.0, "b": 0.0})
    assert found["a"].tolist() == [0.5, 1.5]
    assert found["b"].tolist() == [float("inf")]


class Joint(Fixed):
    """Scores of whole units."""

    joint = True


def test_joint_scores_are_ranked_by_what_units_cost_and_others_are_not():
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)
        )

    scores = {"0": torch.full((8,), 5.0), "2": torch.full((32,), 1.0)}
    inputs = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    plain, by_cost = model(), model()
    shrink(plain, inputs, Fixed(scores), sparsity=0.3, target="flops")
    assert (plain[0].out_features, plain[2].out_features) == (8, 21)
    shrink(by_cost, inputs, Joint(scores), sparsity=0.3, target="flops")
    # A unit of the first layer scores 5 times as much and saves 3.4 times as much: the second goes
    # first still; at 2 times it does not.
    assert by_cost[2].out_features < 32
    cheap = model()
    shrink(
        cheap, inputs, Joint({**scores, "0": torch.full((8,), 2.0)}), sparsity=0.3, target="flops"
    )
    assert (cheap[0].out_features, cheap[2].out_features) == (5, 32)
    units = model()
    shrink(
        units,
        inputs,
        Joint({**scores, "0": torch.full((8,), 2.0)}),
        sparsity=0.3,
        target="channels",
    )
    assert units[0].out_features == 8


def test_isomorphic_classes_lose_the_same_fraction():
    model, inputs = build("resnet"), images()
    groups = find_groups(model, inputs)
    scores = {group.name: torch.arange(group.units).double() for group in groups}
    ranks = isomorphic_ranks(model, groups, scores)
    inner = torch.cat([ranks["3.conv1"], ranks["4.conv1"]])
    assert sorted(inner.tolist()) == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert ranks["0"].max() == 1.0
    shrink(model, inputs, Fixed(scores), sparsity=0.5, target="channels", allocation="isomorphic")
    left = model[3].conv1.out_channels + model[4].conv1.out_channels
    assert abs(left - 10) <= 1
    assert abs(model[0].out_channels - 4) <= 1


@pytest.mark.parametrize("target", ["params", "flops", "channels"])
def test_a_calibration_alone_is_the_recommended_way(target):
    model, inputs = build("resnet"), images()
    report = shrink(model, inputs, calibrated(model), sparsity=0.4, target=target, evaluations=12)
    asked = {"params": report.parameters, "channels": report.units, "flops": report.flops}[target]
    assert asked.sparsity >= 0.4
    assert len(report.curves) == 4
    [repaired] = report.repairs
    assert repaired.loss_repaired < repaired.loss_cut
    assert "repaired: loss" in str(report)
    assert report.difference is not None
    assert report.difference < 1e-4


def test_every_step_measures_and_repairs_anew():
    model, inputs = build("vgg"), images()
    report = shrink(
        model, inputs, calibrated(model), sparsity=0.5, target="flops", steps=2, evaluations=6
    )
    assert report.steps == len(report.repairs) == 2
    assert [curve.units for curve in report.curves] != [6, 8, 10]


def test_any_importance_is_repaired_where_there_is_a_calibration():
    losses = {}
    for how in ("none", "auto", "least_squares"):
        model, inputs = build("resnet"), images()
        calibration = calibrated(model)
        report = shrink(model, inputs, RowNorm(), sparsity=0.4, calibration=calibration, repair=how)
        assert len(report.repairs) == int(how != "none")
        with torch.no_grad():
            losses[how] = sum(float(cross_entropy(model(x), y)) for x, y in calibration.batches())
    assert losses["auto"] == losses["least_squares"] < losses["none"]
    model = build("resnet")
    report = shrink(model, images(), ConsumerGateFisherImportance(calibrated(model)), sparsity=0.4)
    assert len(report.repairs) == 1
    assert report.curves == []


def test_what_needs_a_calibration_asks_for_one():
    model, inputs = build("vgg"), images()
    for options in ({"allocation": "measured"}, {"repair": "least_squares"}):
        with unchanged(model), pytest.raises(ArgumentError, match="Expected a calibration for"):
            shrink(model, inputs, RowNorm(), sparsity=0.3, **options)
    with unchanged(model), pytest.raises(ArgumentError, match="`repair` to be one of"):
        shrink(model, inputs, RowNorm(), sparsity=0.3, repair="mean")
    with unchanged(model), pytest.raises(ArgumentError, match="`evaluations` of at least 1"):
        shrink(model, inputs, calibrated(model), sparsity=0.3, evaluations=0)
    with unchanged(model), pytest.raises(ArgumentTypeError, match="Expected a Calibration"):
        shrink(model, inputs, RowNorm(), sparsity=0.3, calibration=inputs)
    other = calibrated(build("vgg"))
    with unchanged(model), pytest.raises(AlignmentError, match="model of the calibration"):
        shrink(model, inputs, RowNorm(), sparsity=0.3, calibration=other)
    with unchanged(model), pytest.raises(ArgumentError, match="allocation='global'"):
        shrink(model, inputs, Fixed({}), target="evidence", allocation="layer")
