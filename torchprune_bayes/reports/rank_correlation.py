"""How far criteria agree on which gates to close first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import Criterion, gates_of
from torchprune_bayes.reports._criteria import named
from torchprune_bayes.reports.tables import ResultsTable

_CHUNK_PAIRS = 2**21  # pairs of gates that are compared at a time


def rank_correlations(
    model: nn.Module, criteria: Iterable[Criterion | str] | Mapping[str, Criterion | str]
) -> ResultsTable:
    """Spearman's and Kendall's rank correlations of criteria over the gates of a model.

    Args:
        model: A trained model with gates.
        criteria: At least two criteria or their names; a mapping gives them the names of the rows.

    Returns:
        A row for each pair: ``first``, ``second``, ``spearman`` (ρ, ties averaged) and ``kendall``
        (τ_b, which corrects for ties); NaN where a criterion gives all gates the same margin.

    Raises:
        ArgumentError: If there are no gates, fewer than two criteria, or one is unknown.

    Cost: for n gates and each pair of criteria, n² comparisons in pieces of some 50 MiB.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> gates = attach_gates(model)
        >>> with torch.no_grad():
        ...     _ = gates["2:in"].log_sigma.copy_(torch.tensor([-5.0, 0.0, 3.0]))
        >>> print(rank_correlations(model, ["snr", "bmrs-n"]))
        first  second  spearman  kendall
        -----  ------  --------  -------
        snr    bmrs-n       1.0      1.0
    """
    gates = gates_of(model)
    places = {
        name: _places(torch.cat([value.cpu() for value in gates.margins(criterion).values()]))
        for name, criterion in named(criteria).items()
    }
    if len(places) < 2:
        raise ArgumentError(f"Expected at least two different criteria, got {len(places)}.")
    table = ResultsTable()
    for (first, x), (second, y) in combinations(places.items(), 2):
        table.add(first=first, second=second, spearman=_spearman(x, y), kendall=_kendall(x, y))
    return table


def _places(values: Tensor) -> Tensor:
    """Place of each value among the distinct ones, from 0; int64."""
    return torch.unique(values, return_inverse=True)[1]


def _spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of the ranks, where values that tie share the mean of theirs."""
    ranks = []
    for places in (x, y):
        counts = places.bincount().double()
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[places])
    centred = [rank - rank.mean() for rank in ranks]
    spread = math.sqrt(float(centred[0].square().sum() * centred[1].square().sum()))
    return float(centred[0] @ centred[1]) / spread if spread else math.nan


def _kendall(x: Tensor, y: Tensor) -> float:
    """τ_b: concordant less discordant pairs, over the geometric mean of those untied in x or y."""
    balance, n = 0, len(x)
    for rows in torch.arange(n).split(max(1, _CHUNK_PAIRS // n)):
        # Each pair is met twice, as (i, j) and as (j, i), with the same sign.
        signs = [(places[rows, None] - places).sign().to(torch.int8) for places in (x, y)]
        balance += int((signs[0] * signs[1]).sum())
    untied = [n * n - int(places.bincount().square().sum()) for places in (x, y)]
    return balance / math.sqrt(untied[0] * untied[1]) if all(untied) else math.nan
