"""Rank correlations of criteria, against their definitions, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.gates.cases import built, scatter
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import BMRSUniform, Criterion, attach_gates, gates_of
from torchprune_bayes.reports.rank_correlation import _correlations, rank_correlations

NAMES = ["snr", "bmrs-n", "bmrs-u8", "mean", "l2"]


def gated() -> nn.Module:
    model, _ = built("lenet")
    scatter(attach_gates(model), closed=False)
    return model


def margins(model: nn.Module, criterion: Criterion | str) -> Tensor:
    return torch.cat(list(gates_of(model).margins(criterion).values()))


def spearman(x: list[float], y: list[float]) -> float:
    """Pearson's correlation of the ranks; values that tie share the mean of theirs."""
    ranks = [
        [sum(a < b for a in values) + (sum(a == b for a in values) + 1) / 2 for b in values]
        for values in (x, y)
    ]
    centre = (len(x) + 1) / 2
    first, second = ([rank - centre for rank in row] for row in ranks)
    spread = math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))
    return sum(a * b for a, b in zip(first, second, strict=True)) / spread


def kendall(x: list[float], y: list[float]) -> float:
    """τ_b: concordant less discordant pairs, over the geometric mean of those untied."""
    pairs = [
        ((x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j]))
        for i in range(len(x))
        for j in range(i)
    ]
    untied = [sum(pair[k] != 0 for pair in pairs) for k in range(2)]
    return sum(a * b for a, b in pairs) / math.sqrt(untied[0] * untied[1])


def test_all_pairs_of_criteria():
    model = gated()
    rows = list(rank_correlations(model, NAMES))
    assert len(rows) == 10
    for row in rows:
        values = [margins(model, str(row[key])).tolist() for key in ("first", "second")]
        assert row["spearman"] == pytest.approx(spearman(*values), abs=1e-9)
        assert row["kendall"] == pytest.approx(kendall(*values), abs=1e-9)


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=2, max_size=12))
def test_ties(pairs):
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    found = _correlations(x, y)
    if len(x.unique()) == 1 or len(y.unique()) == 1:
        assert all(map(math.isnan, found))
    else:
        values = x.tolist(), y.tolist()
        assert found == pytest.approx((spearman(*values), kendall(*values)), abs=1e-12)


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
    expected = spearman(margins(model, "snr").tolist(), margins(model, hole).tolist())
    assert row["spearman"] == pytest.approx(expected, abs=1e-9)


def test_one_criterion_is_too_few():
    with pytest.raises(ArgumentError, match="at least two different criteria, got 1"):
        rank_correlations(gated(), ["snr", "snr"])
