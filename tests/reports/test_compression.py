"""Curves of accuracy against closed gates, and what criteria close by themselves."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from tests.contracts.state import unchanged
from tests.gates.cases import built, image, scatter
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import BMRSNormal, BMRSUniform, attach_gates, fold_gates, gates_of
from torchprune_bayes.reports.compression import compression_curve, stopping_points, sweep_p1


def gated() -> nn.Module:
    model, _ = built("lenet")
    scatter(attach_gates(model), closed=False)
    return model


def closed(model: nn.Module) -> float:
    return float(gates_of(model).closed)


def test_levels_go_from_nothing_to_all_but_one_gate_at_each_site():
    model = gated()
    rows = list(compression_curve(model, closed, "snr", levels=6))
    units, sites = gates_of(model).units, len(gates_of(model))
    assert rows[0]["metric"] == 0
    assert rows[-1]["metric"] == units - sites
    assert rows[-1]["closed"] == (units - sites) / units
    counts = [row["metric"] for row in rows]
    assert counts == sorted(counts)
    assert len(rows) == 7


def test_the_stopping_point_is_what_pruning_does():
    model = gated()
    rows = [row for row in compression_curve(model, closed, "snr") if row["stop"]]
    expected = copy.deepcopy(model)
    gates_of(expected).prune("snr")
    assert [row["metric"] for row in rows] == [closed(expected)]
    assert 0 < closed(expected) < gates_of(model).units


def test_margins_fall_and_change_sign_at_the_stopping_point():
    rows = list(compression_curve(gated(), closed, "snr", levels=21))
    margins = [row["margin"] for row in rows if "margin" in row]
    assert margins == sorted(margins, reverse=True)
    stop = next(i for i, row in enumerate(rows) if row["stop"])
    assert float(rows[stop]["margin"]) >= 0 > float(rows[-1]["margin"])


def test_copies_are_finetuned_and_the_model_stays():
    model = gated()

    def train(twin: nn.Module) -> None:
        nn.init.zeros_(twin.get_parameter("fc3.bias"))

    with unchanged(model):
        rows = list(
            compression_curve(
                model, lambda m: float(m.fc3.bias.detach().abs().sum()), finetune=train, levels=3
            )
        )
    assert [row["metric"] for row in rows] == [0.0] * 4


def test_fewer_bits_close_more():
    model = gated()
    rows = list(sweep_p1(model, [16, 8, 4, 2, 1]))
    closed_shares = [float(row["closed"]) for row in rows]
    assert closed_shares == sorted(closed_shares)
    assert closed_shares[-1] > closed_shares[0]
    gates_of(model).prune("bmrs-u4", keep=0)
    assert closed_shares[2] == closed(model) / gates_of(model).units


def test_a_curve_may_end_where_the_criterion_stops():
    model = gated()
    rows = list(compression_curve(model, closed, "snr", levels=4, beyond=False))
    gates_of(model).prune("snr")
    assert [row["stop"] for row in rows] == [0, 0, 0, 0, 1]
    assert rows[-1]["metric"] == rows[-2]["metric"] == closed(model)
    assert [float(row["margin"]) >= 0 for row in rows if row["closed"]].count(True) > 1
    assert all(float(row.get("margin", 0)) >= 0 for row in rows)
    assert (rows[0]["level"], rows[-1]["level"]) == (0.0, 1.0)


def test_a_criterion_that_closes_nothing_stops_at_once():
    rows = list(compression_curve(gated(), closed, BMRSNormal(tau=-1e9), levels=2, beyond=False))
    assert [(row["level"], row["metric"]) for row in rows] == [(0.0, 0.0)] * 3


def size(model: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in model.parameters()))


def test_copies_are_cut_for_real():
    model, inputs = gated(), image(2, 1, 14, 14)
    scatter(gates_of(model))  # with some gates that were closed before
    folded = copy.deepcopy(model)
    fold_gates(folded)
    whole = size(folded)
    with unchanged(model):
        rows = list(compression_curve(model, size, "snr", levels=4, example_inputs=inputs))
    for row in rows:
        assert row["metric"] == pytest.approx(whole * (1 - float(row["parameters"])))
    gone = [float(row["parameters"]) for row in rows]
    assert 0 < gone[0] < gone[-1] < 1
    assert gone == sorted(gone)
    assert [float(row["flops"]) for row in rows] == sorted(float(row["flops"]) for row in rows)
    assert float(rows[0]["closed"]) == gates_of(model).closed / gates_of(model).units


def test_shrunk_copies_are_timed_and_finetuned_without_gates():
    model, inputs = gated(), image(2, 1, 14, 14)
    trained: list[nn.Module] = []
    [row] = stopping_points(model, ["snr"], finetune=trained.append, example_inputs=inputs, pairs=2)
    assert float(row["speedup"]) > 0
    assert "metric" not in row
    [twin] = trained
    assert not any("noise_gate" in name for name, _ in twin.named_modules())
    assert size(twin) < size(model)
    assert twin.conv2.out_channels == 3


def test_every_criterion_stops_where_pruning_does():
    model = gated()
    hole = BMRSUniform(8, p2=23, tau=0)
    criteria = {"exact": BMRSNormal(tau=0), "hole": hole, "ratio": "snr"}
    rows = list(stopping_points(model, criteria, closed))
    assert [row["criterion"] for row in rows] == list(criteria)
    for row, criterion in zip(rows, criteria.values(), strict=True):
        twin = copy.deepcopy(model)
        gates_of(twin).prune(criterion)
        assert row["metric"] == closed(twin) == float(row["closed"]) * gates_of(twin).units


def test_a_sweep_measures_too():
    model = gated()
    rows = list(sweep_p1(model, [8, 4], closed, tau=0, keep=2))
    for row in rows:
        twin = copy.deepcopy(model)
        gates_of(twin).prune(BMRSUniform(float(row["p1"]), tau=0), keep=2)
        assert row["metric"] == closed(twin)


def test_impossible_arguments():
    with pytest.raises(ArgumentError, match="Expected one of snr"):
        stopping_points(gated(), ["norm"])
    with pytest.raises(ArgumentError, match="`pairs`"):
        stopping_points(gated(), ["snr"], pairs=-1)
    with pytest.raises(ArgumentError, match="`levels` of at least 2"):
        compression_curve(gated(), closed, levels=1)
    with pytest.raises(ArgumentError, match="got none"):
        compression_curve(nn.Linear(2, 2), closed)
