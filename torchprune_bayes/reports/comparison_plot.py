"""One figure that compares many methods: the best of each family, and each family by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torchprune_bayes.reports.plots import (
    COLOURS,
    blank_figure,
    checked_path,
    lines_of,
    position,
    save_figure,
    set_sparsity_ticks,
    style_axes,
)
from torchprune_bayes.reports.tables import ResultsTable

_GREY = "#C9C9C9"
_PER_ROW = 3
_MAIN, _SMALL = (9.0, 0.045), (7.0, 0.09)  # size of labels and their gap, as fractions of the axes


class _Line(NamedTuple):
    name: str
    places: list[float]
    means: list[float]


def plot_comparison(
    table: ResultsTable,
    path: str | PathLike[str],
    families: Mapping[str, str],
    *,
    y: str = "accuracy",
    title: str | None = None,
) -> Path:
    """Draw the best method of each family in colour and all others in grey, then each family.

    The best of a family is the one with the highest mean over all sparsities. Lines are labelled
    at their ends; below, one small panel for each family shows all of its methods on the same
    axes. Sparsity is logarithmic in the remaining fraction, as in
    :func:`~torchprune_bayes.reports.plot_accuracy_against_sparsity`.

    Args:
        table: One row per run with the columns ``method``, ``sparsity`` and ``y``; rows at
            sparsity 0 are the dense model.
        path: File to write, ending in ``.png``, ``.svg`` or ``.pdf``.
        families: Family of each method; each method without one is its own family.
        y: Column of numbers to draw.
        title: Heading, if any.

    Returns:
        The path written.

    Raises:
        ArgumentError: If the suffix is not one of these, a column is missing, or no row has a
            sparsity above 0.
        MissingExtraError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> table = ResultsTable([{"method": "dense", "sparsity": 0.0, "accuracy": 0.92}])
        >>> for sparsity, accuracy in [(0.5, 0.92), (0.9, 0.88)]:
        ...     table.add(method="woodfisher", sparsity=sparsity, accuracy=accuracy)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_comparison(table, f"{folder}/all.svg", {"woodfisher": "second order"}).name
        'all.svg'
    """
    path = checked_path(path)
    points, dense = lines_of(table, "sparsity", y, "method")
    lines = [
        _Line(name, [position(p.sparsity) for p in line], [p.mean for p in line])
        for name, line in points.items()
    ]
    grouped = _by_family(lines, families)
    rows = ceil(len(grouped) / _PER_ROW)
    figure = blank_figure(9.0, 4.6 + 2.2 * rows, layout="constrained")
    grid = figure.add_gridspec(1 + rows, _PER_ROW, height_ratios=[2.1, *[1.0] * rows])
    sparsities = sorted({p.sparsity for line in points.values() for p in line})
    main = figure.add_subplot(grid[0, :])
    best = {family: members[0] for family, members in grouped.items()}
    colours = dict(zip(best, COLOURS, strict=False))
    _draw(main, lines, {line.name: colours[family] for family, line in best.items()}, dense)
    style_axes(main, "sparsity", y, title)
    set_sparsity_ticks(main, sparsities)
    for index, (family, members) in enumerate(grouped.items()):
        place = grid[1 + index // _PER_ROW, index % _PER_ROW]
        axes = figure.add_subplot(place, sharex=main, sharey=main)
        _draw(axes, lines, dict.fromkeys((m.name for m in members), colours[family]), dense, _SMALL)
        style_axes(axes, "", "", None)
        axes.set_title(family, loc="left", fontsize=9, color=colours[family])
        axes.tick_params(labelsize=7)
    save_figure(figure, path)
    return path


def _by_family(lines: Sequence[_Line], families: Mapping[str, str]) -> dict[str, list[_Line]]:
    """Lines of each family, the best first; families by their best line."""
    grouped: dict[str, list[_Line]] = {}
    for line in sorted(lines, key=lambda line: -sum(line.means) / len(line.means)):
        grouped.setdefault(families.get(line.name, line.name), []).append(line)
    return grouped


def _draw(
    axes: Any,
    lines: Sequence[_Line],
    colours: Mapping[str, str],
    dense: float | None,
    labels: tuple[float, float] = _MAIN,
) -> None:
    """Draw lines, coloured ones over grey ones, with their names at their ends."""
    if dense is not None:
        axes.axhline(dense, color="#767676", linestyle=(0, (5, 3)), linewidth=1.0, zorder=1)
    for line in lines:
        colour = colours.get(line.name)
        axes.plot(
            line.places,
            line.means,
            color=colour or _GREY,
            linewidth=1.0 if colour is None else 2.0,
            marker=None if colour is None or len(line.places) > 1 else "o",
            zorder=2 if colour is None else 3,
        )
    labelled = sorted(
        (line for line in lines if line.name in colours), key=lambda line: -line.means[-1]
    )
    everything = [mean for line in lines for mean in line.means]
    span = max(max(everything) - min(everything), 1e-9)
    size, gap = labels
    heights = _apart([line.means[-1] for line in labelled], gap * span)
    for line, height in zip(labelled, heights, strict=True):
        axes.annotate(
            line.name,
            (line.places[-1], height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=colours[line.name],
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move descending heights as little as possible so that neighbours are ``gap`` apart.

    Example:
        >>> _apart([0.5, 0.5], 0.2)
        [0.6, 0.4]
    """
    groups: list[list[float]] = []  # of heights that touch; each group keeps its centre
    for height in heights:
        groups.append([height])
        while len(groups) > 1:
            upper, lower = groups[-2], groups[-1]
            bottom = sum(upper) / len(upper) - gap * (len(upper) - 1) / 2
            top = sum(lower) / len(lower) + gap * (len(lower) - 1) / 2
            if bottom - top >= gap - 1e-12:
                break
            groups[-2:] = [upper + lower]
    return [
        sum(group) / len(group) + gap * ((len(group) - 1) / 2 - index)
        for group in groups
        for index in range(len(group))
    ]
