"""Rank correlations of criteria, against scipy's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr  # type: ignore[import-untyped]
from torch import Tensor, nn

from tests.gates.cases import built, scatter
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import BMRSUniform, Criterion, attach_gates, gates_of
from torchprune_bayes.reports import rank_correlation
from torchprune_bayes.reports.rank_correlation import rank_correlations

NAMES = ["snr", "bmrs-n", "bmrs-u8", "mean", "l2"]


def gated() -> nn.Module:
    model, _ = built("lenet")
    scatter(attach_gates(model), closed=False)
    return model


def margins(model: nn.Module, criterion: Criterion | str) -> Tensor:
    return torch.cat(list(gates_of(model).margins(criterion).values()))


def test_all_pairs_of_criteria():
    model = gated()
    rows = list(rank_correlations(model, NAMES))
    assert len(rows) == 10
    for row in rows:
        first, second = (margins(model, str(row[key])) for key in ("first", "second"))
        assert row["spearman"] == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
        assert row["kendall"] == pytest.approx(kendalltau(first, second).statistic, abs=1e-12)


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=2, max_size=12))
def test_ties(pairs):
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    places = [rank_correlation._places(values) for values in (x, y)]
    found = (rank_correlation._spearman(*places), rank_correlation._kendall(*places))
    if len(x.unique()) == 1 or len(y.unique()) == 1:
        assert all(map(math.isnan, found))
    else:
        expected = (spearmanr(x, y).statistic, kendalltau(x, y).statistic)
        assert found == pytest.approx(expected, abs=1e-12)


def test_many_gates_are_compared_in_pieces(monkeypatch):
    model = gated()
    whole = list(rank_correlations(model, NAMES))
    monkeypatch.setattr(rank_correlation, "_CHUNK_PAIRS", 50)
    assert list(rank_correlations(model, NAMES)) == whole


def test_criteria_that_say_nothing_have_no_correlation():
    gates = attach_gates(built("mlp")[0])
    [row] = rank_correlations(gates.model, ["mean", "l2"])
    assert math.isnan(float(row["spearman"]))
    assert math.isnan(float(row["kendall"]))


def test_names_of_the_rows():
    model = gated()
    hole = BMRSUniform(8, p2=23, tau=0)
    [row] = rank_correlations(model, {"ratio": "snr", "with the hole": hole})
    assert (row["first"], row["second"]) == ("ratio", "with the hole")
    expected = spearmanr(margins(model, "snr"), margins(model, hole)).statistic
    assert row["spearman"] == pytest.approx(expected, abs=1e-12)


def test_one_criterion_is_too_few():
    with pytest.raises(ArgumentError, match="at least two different criteria, got 1"):
        rank_correlations(gated(), ["snr", "snr"])
