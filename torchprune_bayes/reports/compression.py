"""How far units can be closed, by which ranking, and where the evidence says to stop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_count
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import (
    DEFAULT_TAU,
    BMRSUniform,
    Criterion,
    choose_closed,
    find_criterion,
    gates_of,
)
from torchprune_bayes.reports.tables import ResultsTable


def compression_curve(
    model: nn.Module,
    measure: Callable[[nn.Module], float],
    criterion: Criterion | str = "bmrs-n",
    *,
    levels: int = 11,
    finetune: Callable[[nn.Module], object] | None = None,
    keep: int = 1,
) -> ResultsTable:
    """Close more and more gates of copies of a trained model, the most redundant first.

    This is the post-training mode of arXiv:2406.01345, section 5.2: gates of all sites are ranked
    together, and the criterion marks the level at which it would stop by itself. Rankings that have
    no zero of their own are compared at that level, by giving them its ``closed``.

    Args:
        model: A trained model with gates; it stays as it is.
        measure: Gives the metric of a model, such as its accuracy.
        criterion: A criterion or its name.
        levels: Number of levels, from no gate closed to all but ``keep``.
        finetune: Trains a copy for a little while after its gates were closed.
        keep: Gates that stay open at each site.

    Returns:
        A row for each level and one for the stopping point: ``closed`` (fraction of all gates),
        ``metric``, ``margin`` (the smallest among the gates that were closed for it; negative
        where the criterion says no) and ``stop`` (1 at the stopping point, else 0).

    Raises:
        ArgumentError: If the model has no gates or the criterion is unknown.

    Cost: a copy of the model, a measurement and a fine-tuning for each level.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> gates = attach_gates(model)
        >>> with torch.no_grad():
        ...     _ = gates["2:in"].mu.copy_(torch.tensor([0.0, -1.0, -20.0]))
        >>> table = compression_curve(model, lambda m: float(gates_of(m).closed), "mean", levels=2)
        >>> [(row["metric"], row["stop"]) for row in table]
        [(0.0, 0), (1.0, 1), (2.0, 0)]
    """
    check_count("levels", levels, minimum=2)
    found = find_criterion(criterion)
    gates = gates_of(model)
    margins, masks = gates.margins(found), gates.masks
    most = sum(max(int(mask.sum()) - keep, 0) for mask in masks.values())
    counts = [(round(most * level / (levels - 1)), 0) for level in range(levels)]
    chosen = choose_closed(margins, masks, keep=keep)
    counts.append((sum(int(dead.sum()) for dead in chosen.values()), 1))
    table = ResultsTable()
    for count, stop in sorted(counts):
        dead = choose_closed(margins, masks, amount=count, beyond=True, keep=keep)
        twin = copy.deepcopy(model)
        twins = gates_of(twin)
        for name, gone in dead.items():
            twins[name].close(gone)
        if finetune is not None:
            finetune(twin)
        closed = torch.cat([margins[name][gone] for name, gone in dead.items()])
        margin = {"margin": float(closed.min())} if count else {}
        closed_share = twins.closed / twins.units
        table.add(closed=closed_share, metric=float(measure(twin)), **margin, stop=stop)
    return table


def rank_correlations(model: nn.Module, criteria: Iterable[Criterion | str]) -> ResultsTable:
    """Spearman's rank correlation of criteria over the gates of a model, ties averaged.

    Args:
        model: A trained model with gates.
        criteria: At least two criteria or their names.

    Returns:
        A row for each pair: ``first``, ``second`` and ``correlation``; NaN where a criterion
        gives all gates the same margin.

    Raises:
        ArgumentError: If there are no gates, fewer than two criteria, or one is unknown.

    Cost: one sort of all margins for each criterion.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> gates = attach_gates(model)
        >>> with torch.no_grad():
        ...     _ = gates["2:in"].log_sigma.copy_(torch.tensor([-5.0, 0.0, 3.0]))
        >>> print(rank_correlations(model, ["snr", "bmrs-n"]))
        first  second  correlation
        -----  ------  -----------
        snr    bmrs-n          1.0
    """
    gates = gates_of(model)
    ranks: dict[str, Tensor] = {}
    for criterion in criteria:
        margins = torch.cat([value.cpu() for value in gates.margins(criterion).values()])
        ranks[criterion if isinstance(criterion, str) else repr(criterion)] = _ranks(margins)
    if len(ranks) < 2:
        raise ArgumentError(f"Expected at least two different criteria, got {len(ranks)}.")
    correlations = torch.corrcoef(torch.stack(list(ranks.values())))
    table, names = ResultsTable(), list(ranks)
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            found = round(float(correlations[i, j]), 12)
            table.add(first=first, second=names[j], correlation=found)
    return table


def sweep_p1(
    model: nn.Module,
    bits: Iterable[float] = (16, 12, 8, 6, 4, 2),
    *,
    p2: float | None = None,
    tau: float = DEFAULT_TAU,
) -> ResultsTable:
    """Count what BMRS_U would close at several cut-offs (arXiv:2406.01345, figure 4).

    Args:
        model: A trained model with gates; it stays as it is.
        bits: Values of ``p1``; fewer bits close more.
        p2: See :class:`~torchprune_bayes.gates.BMRSUniform`.
        tau: See :class:`~torchprune_bayes.gates.BMRSUniform`.

    Returns:
        A row for each: ``p1`` and ``closed``, the fraction of all gates.

    Raises:
        ArgumentError: If there are no gates or a value of ``p1`` is impossible.

    Cost: a few evaluations of log Φ for each gate and cut-off.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> gates = attach_gates(model)
        >>> with torch.no_grad():
        ...     _ = gates["2:in"].mu.copy_(torch.tensor([0.0, -5.0]))
        >>> [row["closed"] for row in sweep_p1(model, [8, 4])]
        [0.0, 0.5]
    """
    gates = gates_of(model)
    table = ResultsTable()
    for p1 in bits:
        margins = gates.margins(BMRSUniform(float(p1), p2, tau))
        closed = sum(int((value >= 0).sum()) for value in margins.values())
        table.add(p1=float(p1), closed=closed / gates.units)
    return table


def _ranks(values: Tensor) -> Tensor:
    # Entries that tie share the mean of the places that they take up.
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
