"""Histogram of a model's gates, and which of them a criterion leaves open."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports.plots import (
    COLOURS,
    blank_figure,
    checked_path,
    save_figure,
    style_axes,
)
from torchprune_bayes.reports.tables import ResultsTable


def plot_gate_means(
    table: ResultsTable,
    path: str | PathLike[str],
    *,
    bins: int = 40,
    title: str | None = None,
) -> Path:
    """Draw histograms of the gates' posterior means E[θ], all of them and those that are kept.

    Figure 1 of BMRS (arXiv:2406.01345): gates that the data do not need collect at zero, and the
    evidence closes them.

    Args:
        table: A row for each gate with the columns ``mean`` and ``kept`` (1 or 0).
        path: File to write, ending in ``.png``, ``.svg`` or ``.pdf``.
        bins: Bars between 0 and 1.
        title: Heading, if any.

    Returns:
        The path written.

    Raises:
        ArgumentError: If the suffix is not one of these, a column is missing or there is no gate.
        MissingExtraError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> rows = [{"mean": 0.01, "kept": 0}, {"mean": 0.9, "kept": 1}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_gate_means(ResultsTable(rows), f"{folder}/gates.svg").name
        'gates.svg'
    """
    path, rows = checked_path(path), list(table)
    if not rows or any("mean" not in row or "kept" not in row for row in rows):
        raise ArgumentError("Expected rows with the columns 'mean' and 'kept', got none of one.")
    figure = blank_figure(7.0, 3.4)
    whole = figure.add_subplot(1, 2, 1)
    left = figure.add_subplot(1, 2, 2, sharey=whole)
    before = [float(row["mean"]) for row in rows]
    after = [float(row["mean"]) for row in rows if row["kept"]]
    for axes, means, colour, name in (
        (whole, before, COLOURS[0], f"{len(before)} gates"),
        (left, after, COLOURS[1], f"{len(after)} kept"),
    ):
        style_axes(axes, "posterior_mean_of_a_gate", "gates" if axes is whole else "", name)
        axes.hist(means, bins=bins, range=(0.0, 1.0), color=colour)
        axes.set_yscale("symlog")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    save_figure(figure, path)
    return path
