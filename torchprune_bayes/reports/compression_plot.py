"""Accuracy against compression, with the points at which criteria stop by themselves."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports.plots import (
    checked_path,
    draw_legend,
    draw_series,
    new_figure,
    save_figure,
)
from torchprune_bayes.reports.tables import ResultsTable

_STAR = {
    "linestyle": "none",
    "marker": "*",
    "markersize": 15.0,
    "markeredgecolor": "#333333",
    "markeredgewidth": 0.9,
}


def plot_accuracy_against_compression(
    table: ResultsTable,
    path: str | PathLike[str],
    *,
    x: str = "parameters",
    y: str = "metric",
    series: str = "criterion",
    title: str | None = None,
) -> Path:
    """Draw one line per ranking, and a star where the evidence stops, with a tick below it.

    The rows are those of :func:`~torchprune_bayes.reports.compression_curve` of one or more runs,
    with a column that names the ranking. Runs are averaged level by level, with a band of one
    standard deviation; stars are averages of stopping points, with bars of one standard deviation.
    A ranking without rows of ``stop`` 1 has no star.

    Args:
        table: Rows with the columns ``level``, ``stop`` and the three below.
        path: File to write, ending in ``.png``, ``.svg`` or ``.pdf``.
        x: Column of removed fractions: ``"parameters"``, ``"flops"`` or ``"closed"``.
        y: Column of numbers to draw.
        series: Column that names the lines.
        title: Heading, if any.

    Returns:
        The path written.

    Raises:
        ArgumentError: If the suffix is not one of these, a column is missing or there is no level
            to draw.
        MissingExtraError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from torchprune_bayes.reports import ResultsTable
        >>> table = ResultsTable()
        >>> for level, gone, stop in [(0.0, 0.0, 0), (0.5, 0.6, 0), (0.6, 0.7, 1), (1.0, 0.9, 0)]:
        ...     table.add(criterion="BMRS_N", level=level, parameters=gone, metric=1 - gone**9,
        ...         stop=stop)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_accuracy_against_compression(table, f"{folder}/curve.svg").name
        'curve.svg'
    """
    path = checked_path(path)
    lines = _points(table, 0, [series, "level"], x, y)
    stops = _points(table, 1, [series], x, y)
    if not lines:
        raise ArgumentError("Expected a row of `stop` 0 to draw, got none.")
    figure, axes = new_figure(f"{x} removed", y, title)
    drawn = {
        name: [(point.x, point.y, point.y_std) for point in sorted(line)]
        for name, line in lines.items()
    }
    entries = draw_series(axes, drawn.items(), width=1.6, size=5.0)
    for handle, name in entries:
        for stop in stops.get(name, []):
            _draw_stop(axes, stop, handle.get_color())
    if stops:
        (star,) = axes.plot([], [], color="#AAAAAA", **_STAR)
        entries.append((star, "stopping point"))
    draw_legend(axes, entries)
    save_figure(figure, path)
    return path


class _Point(NamedTuple):
    x: float
    y: float
    x_std: float  # NaN for a single run
    y_std: float


def _points(
    table: ResultsTable, stop: int, by: list[str], x: str, y: str
) -> dict[str, list[_Point]]:
    rows = list(table)
    if any("stop" not in row for row in rows):
        raise ArgumentError("Expected a column 'stop' in every row, got a row without.")
    points: dict[str, list[_Point]] = {}
    chosen = ResultsTable(row for row in rows if row["stop"] == stop)
    for row in chosen.summarise(by=by, values=[x, y]):
        numbers = (float(row[f"{name}_{part}"]) for part in ("mean", "std") for name in (x, y))
        points.setdefault(str(row[by[0]]), []).append(_Point(*numbers))
    return points


def _draw_stop(axes: Any, stop: _Point, colour: str) -> None:
    # Above all lines, with a tick at the bottom of the axes to separate coinciding stars.
    axes.errorbar(stop.x, stop.y, stop.y_std, stop.x_std, color=colour, linewidth=1.2, zorder=4)
    axes.axvline(stop.x, ymax=0.05, color=colour, linewidth=1.6, zorder=4)
    axes.plot(stop.x, stop.y, color=colour, zorder=5, **_STAR)
