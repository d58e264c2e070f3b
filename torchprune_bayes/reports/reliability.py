"""A reliability diagram: accuracy against confidence."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from os import PathLike
from pathlib import Path

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports.plots import (
    checked_path,
    draw_legend,
    draw_series,
    new_figure,
    save_figure,
)
from torchprune_bayes.reports.tables import ResultsTable


def plot_reliability(
    models: Mapping[str, ResultsTable], path: str | PathLike[str], *, title: str | None = None
) -> Path:
    """Draw accuracy against confidence, bin by bin, beside the diagonal of a calibrated model.

    Points below the diagonal are over-confident (Guo et al., 2017, arXiv:1706.04599, figure 1).

    Args:
        models: :meth:`~torchprune_bayes.reports.MetricSums.reliability` of each model, by name.
        path: File to write, ending in ``.png``, ``.svg`` or ``.pdf``.
        title: Heading, if any.

    Returns:
        The path written.

    Raises:
        ArgumentError: If the suffix is not one of these or there is no model.
        MissingExtraError: If matplotlib is not installed.

    Example:
        >>> import tempfile, torch
        >>> from torchprune_bayes.reports import MetricSums
        >>> sums = MetricSums().update(torch.eye(4) * 2, torch.tensor([0, 1, 2, 2]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_reliability({"dense": sums.reliability()}, f"{folder}/reliability.svg").name
        'reliability.svg'
    """
    path = checked_path(path)
    if not models:
        raise ArgumentError("Expected the reliability of at least one model, got none.")
    figure, axes = new_figure("confidence", "accuracy", title)
    axes.plot([0, 1], [0, 1], color="#767676", linestyle=(0, (5, 3)), linewidth=1.0)
    series = {
        name: [(float(row["confidence"]), float(row["accuracy"]), nan) for row in table]
        for name, table in models.items()
    }
    entries = draw_series(axes, series.items())
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    draw_legend(axes, entries)
    save_figure(figure, path)
    return path
