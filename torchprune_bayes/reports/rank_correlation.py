"""How far criteria agree on which gates to close first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes._extras import optional
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import Criterion, gates_of
from torchprune_bayes.reports._criteria import named
from torchprune_bayes.reports.tables import ResultsTable


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
        MissingExtraError: If scipy is not installed.

    Cost: for n gates and each pair of criteria, n log n comparisons.

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
    margins = {
        name: torch.cat([value.cpu() for value in gates.margins(criterion).values()])
        for name, criterion in named(criteria).items()
    }
    if len(margins) < 2:
        raise ArgumentError(f"Expected at least two different criteria, got {len(margins)}.")
    table = ResultsTable()
    for (first, x), (second, y) in combinations(margins.items(), 2):
        spearman, kendall = _correlations(x, y)
        table.add(first=first, second=second, spearman=spearman, kendall=kendall)
    return table


def _correlations(x: Tensor, y: Tensor) -> tuple[float, float]:
    with optional("scipy", "plots"):
        from scipy import stats
    if len(x.unique()) == 1 or len(y.unique()) == 1:  # no order, of which scipy would warn
        return math.nan, math.nan
    results: list[Any] = [stats.spearmanr(x, y), stats.kendalltau(x, y)]
    spearman, kendall = (float(result.statistic) for result in results)
    return spearman, kendall
