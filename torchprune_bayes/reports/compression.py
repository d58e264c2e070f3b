"""How far units can be closed, by which ranking, and where the evidence stops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_count
from torchprune_bayes.gates import (
    DEFAULT_TAU,
    BMRSUniform,
    Criterion,
    choose_closed,
    find_criterion,
    gates_of,
)
from torchprune_bayes.reports._criteria import named
from torchprune_bayes.reports._trials import Finetune, Measure, Trial
from torchprune_bayes.reports.tables import ResultsTable


def compression_curve(
    model: nn.Module,
    measure: Measure,
    criterion: Criterion | str = "bmrs-n",
    *,
    levels: int = 11,
    beyond: bool = True,
    finetune: Finetune | None = None,
    keep: int = 1,
    example_inputs: Any = None,
    pairs: int = 0,
) -> ResultsTable:
    """Close more and more gates of copies of a trained model, the most redundant first.

    This is the post-training mode of arXiv:2406.01345, section 5.2: gates of all sites are ranked
    jointly, and one row marks where the criterion would stop by itself: for BMRS where the change
    of the log evidence falls below ``-tau``, which is zero with ``tau = 0``. Rankings without a
    stopping point are compared at that level, by passing them its ``closed``.

    Args:
        model: A trained model with gates; it is not changed.
        measure: Returns the metric of a model, such as its accuracy.
        criterion: A criterion or its name.
        levels: Number of levels, from no gate closed to all but ``keep``.
        beyond: Whether the levels continue beyond the stopping point, or end there.
        finetune: Trains a copy briefly after its gates were closed.
        keep: Gates that stay open at each site.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments. With it
            the gates of each copy are folded and the closed units are removed, before the
            fine-tuning; without it, copies keep their gates, and no sizes are reported.
        pairs: Timed passes of each shrunk copy and of the whole model without gates; 0 does
            not time.

    Returns:
        A row for each level and one for the stopping point: ``level`` (from 0 to 1), ``closed``
        (fraction of all gates); with ``example_inputs`` also ``parameters`` and ``flops``
        (removed fractions of the whole model), with ``pairs`` ``speedup`` (before/after);
        ``metric``; ``margin`` (the smallest among the gates closed at this level; negative
        where the criterion is against it) and ``stop`` (1 at the stopping point, else 0).

    Raises:
        ArgumentError: If the model has no gates or the criterion is unknown.

    Cost: a copy of the model, a measurement and a fine-tuning for each level.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> gates = attach_gates(model)
        >>> with torch.no_grad():
        ...     _ = gates["2:in"].mu.copy_(torch.tensor([0.0, -1.0, -20.0]))
        >>> def left(m: nn.Module) -> int:
        ...     return sum(p.numel() for p in m.parameters())
        >>> table = compression_curve(
        ...     model, left, "mean", levels=2, example_inputs=torch.zeros(1, 2)
        ... )
        >>> [(row["metric"], round(row["parameters"], 3), row["stop"]) for row in table]
        [(17.0, 0.0, 0), (12.0, 0.294, 1), (7.0, 0.588, 0)]
    """
    check_count("levels", levels, minimum=2)
    check_count("pairs", pairs, minimum=0)
    gates = gates_of(model)
    margins, masks = gates.margins(find_criterion(criterion)), gates.masks
    stop = _total(choose_closed(margins, masks, keep=keep))
    last = sum(max(int(mask.sum()) - keep, 0) for mask in masks.values()) if beyond else stop
    counts = [(round(last * level / (levels - 1)), 0) for level in range(levels)]
    trial = Trial(model, measure, finetune, example_inputs, pairs)
    table = ResultsTable()
    for count, stops in sorted([*counts, (stop, 1)]):
        chosen = choose_closed(margins, masks, amount=count, beyond=True, keep=keep)
        closed = torch.cat([margins[name][closing] for name, closing in chosen.items()])
        margin = {"margin": float(closed.min())} if count else {}
        table.add(level=count / (last or 1), **trial.run(chosen), **margin, stop=stops)
    return table


def stopping_points(
    model: nn.Module,
    criteria: Iterable[Criterion | str] | Mapping[str, Criterion | str],
    measure: Measure | None = None,
    *,
    finetune: Finetune | None = None,
    keep: int = 1,
    example_inputs: Any = None,
    pairs: int = 0,
) -> ResultsTable:
    """Close the gates that each of several criteria selects, in copies of one trained model.

    Args:
        model: A trained model with gates; it is not changed.
        criteria: Criteria or their names; a mapping gives them the names of the rows.
        measure: Returns the metric of a model, such as its accuracy.
        finetune: See :func:`compression_curve`.
        keep: See :func:`compression_curve`.
        example_inputs: See :func:`compression_curve`.
        pairs: See :func:`compression_curve`.

    Returns:
        A row for each: ``criterion``, ``closed``, and the columns of :func:`compression_curve`
        whose arguments are given.

    Raises:
        ArgumentError: If the model has no gates or a criterion is unknown.

    Cost: a copy of the model, a measurement and a fine-tuning for each criterion.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> gates = attach_gates(model)
        >>> with torch.no_grad():
        ...     _ = gates["2:in"].mu.copy_(torch.tensor([0.0, -5.0, -19.0, -20.0]))
        ...     _ = gates["2:in"].log_sigma.copy_(torch.tensor([-5.0, 1.0, 1.0, -5.0]))
        >>> print(stopping_points(model, ["bmrs-n", "bmrs-u8", "snr"]))
        criterion  closed
        ---------  ------
        bmrs-n       0.50
        bmrs-u8      0.75
        snr          0.50
    """
    check_count("pairs", pairs, minimum=0)
    gates = gates_of(model)
    trial = Trial(model, measure, finetune, example_inputs, pairs)
    chosen = {
        name: choose_closed(gates.margins(criterion), gates.masks, keep=keep)
        for name, criterion in named(criteria).items()
    }
    return ResultsTable(
        {"criterion": name, **trial.run(closing)} for name, closing in chosen.items()
    )


def sweep_p1(
    model: nn.Module,
    bits: Iterable[float] = (16, 12, 8, 6, 4, 2),
    measure: Measure | None = None,
    *,
    p2: float | None = None,
    tau: float = DEFAULT_TAU,
    **options: Any,
) -> ResultsTable:
    """Close the gates that BMRS_U selects at several cut-offs (arXiv:2406.01345, figure 4).

    Args:
        model: A trained model with gates; it stays as it is.
        bits: Values of ``p1``; fewer bits close more.
        measure: Returns the metric of a model, such as its accuracy.
        p2: See :class:`~torchprune_bayes.gates.BMRSUniform`.
        tau: See :class:`~torchprune_bayes.gates.BMRSUniform`.
        options: Further arguments of :func:`stopping_points`.

    Returns:
        A row for each: ``p1`` and the columns of :func:`stopping_points`.

    Raises:
        ArgumentError: If there are no gates or a value of ``p1`` is impossible.

    Cost: that of :func:`stopping_points`.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> gates = attach_gates(model)
        >>> with torch.no_grad():
        ...     _ = gates["2:in"].mu.copy_(torch.tensor([0.0, -5.0]))
        >>> [row["closed"] for row in sweep_p1(model, [8, 4])]
        [0.0, 0.5]
    """
    swept = {f"{p1:g}": BMRSUniform(float(p1), p2, tau) for p1 in bits}
    rows = stopping_points(model, swept, measure, **options)
    return ResultsTable({"p1": float(row.pop("criterion")), **row} for row in rows)


def _total(chosen: Mapping[str, Tensor]) -> int:
    return sum(int(closing.sum()) for closing in chosen.values())
