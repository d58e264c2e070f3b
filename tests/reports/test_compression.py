"""Curves of accuracy against closed gates, and correlations of rankings."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import nn

from tests.contracts.state import unchanged
from tests.gates.cases import built, scatter
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import attach_gates, gates_of
from torchprune_bayes.reports.compression import compression_curve, rank_correlations, sweep_p1


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


def test_spearman():
    model = gated()
    gates = gates_of(model)
    names = ["snr", "bmrs-n", "bmrs-u8", "mean", "l2"]
    for row in rank_correlations(model, names):
        first, second = (
            torch.cat(list(gates.margins(str(row[key])).values())) for key in ("first", "second")
        )
        assert row["correlation"] == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)


def test_ties_and_constants():
    model, _ = built("mlp")
    gates = attach_gates(model)
    with torch.no_grad():
        gates["2:in"].mu.copy_(torch.tensor([0.0, -1, -1, -2, -2]))
    [row] = rank_correlations(model, ["mean", "l2"])
    first, second = (torch.cat(list(gates.margins(key).values())) for key in ("mean", "l2"))
    assert row["correlation"] == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)
    with torch.no_grad():
        gates["2:in"].mu.zero_()
    [row] = rank_correlations(model, ["mean", "l2"])
    assert math.isnan(float(row["correlation"]))


def test_fewer_bits_close_more():
    model = gated()
    rows = list(sweep_p1(model, [16, 8, 4, 2, 1]))
    closed_shares = [float(row["closed"]) for row in rows]
    assert closed_shares == sorted(closed_shares)
    assert closed_shares[-1] > closed_shares[0]
    gates_of(model).prune("bmrs-u4", keep=0)
    assert closed_shares[2] == closed(model) / gates_of(model).units


def test_impossible_arguments():
    with pytest.raises(ArgumentError, match="at least two"):
        rank_correlations(gated(), ["snr"])
    with pytest.raises(ArgumentError, match="`levels` of at least 2"):
        compression_curve(gated(), closed, levels=1)
    with pytest.raises(ArgumentError, match="got none"):
        compression_curve(nn.Linear(2, 2), closed)
