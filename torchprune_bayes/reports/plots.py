"""Figures of results; matplotlib is imported inside the functions, pyplot never."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torchprune_bayes._checks import check_choice
from torchprune_bayes._extras import optional
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports.tables import ResultsTable

_SUFFIXES = (".png", ".svg", ".pdf")
_GREY, _INK = "#767676", "#333333"
_CHARACTER = 0.0185  # of a tick label with its share of the gap, as a fraction of the data's width
# Twelve hues, neighbours apart in lightness too. Eleven markers, so that the pairs of colour and
# marker repeat only after 132 series.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC3D8F", "#E69F00", "#4B3B9B",
    "#56B4E9", "#8C1C13", "#8FB339", "#B07AA1", "#7A5230", "#111111",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "h")
Points: TypeAlias = Sequence[tuple[float, float, float]]  # places, values, spreads (NaN: no band)


def plot_accuracy_against_sparsity(
    table: ResultsTable,
    path: str | PathLike[str],
    *,
    x: str = "sparsity",
    y: str = "accuracy",
    series: str = "method",
    title: str | None = None,
) -> Path:
    """Draw one line per method, with a band of one standard deviation over seeds.

    The axis is logarithmic in the remaining fraction, 1 - sparsity, and labelled with sparsities,
    so that .9, .95, .98 and .99 are well separated. Rows at sparsity 0 are the dense model: their
    mean is the dashed reference line. Runs are averaged where their sparsities are equal, so fill
    the column with targets, not with the sparsity that each run reached. The legend lists the
    methods by their values at the highest sparsity.

    Args:
        table: One row per run with the three columns below; other columns are ignored.
        path: File to write, ending in ``.png``, ``.svg`` or ``.pdf``.
        x: Column of sparsities, fractions in [0, 1).
        y: Column of numbers to draw.
        series: Column that names the lines.
        title: Heading, if any.

    Returns:
        The path written.

    Raises:
        ArgumentError: If the suffix is not one of these, a column is missing, a sparsity is not in
            [0, 1) or no row has a sparsity above 0.
        MissingExtraError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from torchprune_bayes.reports import ResultsTable, plot_accuracy_against_sparsity
        >>> table = ResultsTable([{"method": "dense", "sparsity": 0.0, "accuracy": 0.92}])
        >>> for sparsity, accuracy in [(0.5, 0.92), (0.9, 0.88), (0.98, 0.71)]:
        ...     table.add(method="WoodFisher", sparsity=sparsity, accuracy=accuracy)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_accuracy_against_sparsity(table, f"{folder}/accuracy.svg").name
        'accuracy.svg'
    """
    path = checked_path(path)
    lines, dense = lines_of(table, x, y, series)
    figure, axes = new_figure(x, y, title)
    set_sparsity_ticks(axes, sorted({point.sparsity for line in lines.values() for point in line}))
    # Ordered by the last value, the legend reads like the right edge of the figure.
    entries = sorted(
        draw_series(
            axes,
            (
                (name, [(position(p.sparsity), p.mean, p.std) for p in line])
                for name, line in lines.items()
            ),
        ),
        key=lambda entry: -lines[entry[1]][-1].mean,
    )
    if dense is not None:
        reference = axes.axhline(dense, color=_GREY, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
        entries.insert(0, (reference, "dense"))
    draw_legend(axes, entries)
    save_figure(figure, path)
    return path


def checked_path(path: str | PathLike[str]) -> Path:
    """Refuse suffixes of formats that figures are not written in."""
    checked = Path(path)
    check_choice("path.suffix", checked.suffix.lower(), _SUFFIXES)
    return checked


class _Point(NamedTuple):
    sparsity: float
    mean: float
    std: float  # NaN for a single run


def lines_of(
    table: ResultsTable, x: str, y: str, series: str
) -> tuple[dict[str, list[_Point]], float | None]:
    """Return the points of each series by ascending sparsity, and the mean at sparsity 0."""
    lines: dict[str, list[_Point]] = {}
    for row in table.summarise(by=[series, x], values=[y]):
        sparsity = row[x]
        if isinstance(sparsity, str) or not 0 <= sparsity < 1:
            raise ArgumentError(f"Expected sparsities in [0, 1) in column {x!r}, got {sparsity!r}.")
        if sparsity > 0:
            point = _Point(float(sparsity), float(row[f"{y}_mean"]), float(row[f"{y}_std"]))
            lines.setdefault(str(row[series]), []).append(point)
    if not lines:
        raise ArgumentError(f"Expected a row with a sparsity above 0 in column {x!r}, got none.")
    dense = [row for row in table.summarise(by=[x], values=[y]) if row[x] == 0]
    return (
        {name: sorted(line) for name, line in lines.items()},
        float(dense[0][f"{y}_mean"]) if dense else None,
    )


def new_figure(x: str, y: str, title: str | None) -> tuple[Any, Any]:
    """An empty figure whose axes are labelled with two columns, and the axes."""
    figure = blank_figure(7.0, 4.4)
    axes = figure.add_subplot()
    style_axes(axes, x, y, title)
    return figure, axes


def blank_figure(width: float, height: float, **options: Any) -> Any:
    """A figure without axes, in inches; without pyplot and its global state."""
    with optional("matplotlib", "plots"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)  # attaches itself
    return figure


def style_axes(axes: Any, x: str, y: str, title: str | None) -> None:
    """Label axes with two columns and remove unneeded lines."""
    axes.set_xlabel(_words(x), color=_INK, labelpad=8)
    axes.set_ylabel(_words(y), color=_INK, labelpad=8)
    if title:
        axes.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold", pad=12)
    axes.tick_params(colors=_INK, length=3, width=0.8)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#B0B0B0")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure with its legend."""
    figure.savefig(path, dpi=200, bbox_inches="tight", facecolor="white")


def _words(column: str) -> str:
    words = column.replace("_", " ")
    return words[:1].upper() + words[1:]


def position(sparsity: float) -> float:
    """Place a sparsity: each step to the right divides the remaining fraction by ten."""
    return -math.log10(1.0 - sparsity)


def set_sparsity_ticks(axes: Any, sparsities: list[float]) -> None:
    """Label those of the sparsities, ascending, that fit."""
    width = position(sparsities[-1]) - position(sparsities[0])
    labels: dict[float, str] = {}
    # The highest always has its label; after that 0.9 is preferred to 0.905.
    for sparsity in sorted(sparsities, key=lambda s: (s != sparsities[-1], len(f"{s:.6g}"), -s)):
        label, place = f"{sparsity:.6g}", position(sparsity)
        if all(
            abs(place - other) >= _CHARACTER * (len(label) + len(text)) / 2 * width
            for other, text in labels.items()
        ):
            labels[place] = label
    axes.set_xticks(list(labels), list(labels.values()))


def draw_series(
    axes: Any, series: Iterable[tuple[str, Points]], **options: float
) -> list[tuple[Any, str]]:
    """Draw named lines, each with its own colour and marker; returns the entries of their legend.

    Args:
        axes: Where to draw.
        series: Names, which may repeat, and what :func:`draw_line` takes.
        **options: Its ``width`` and ``size``.
    """
    styles = zip(series, cycle(COLOURS), cycle(_MARKERS), strict=False)
    return [
        (draw_line(axes, points, colour, marker, **options), name)
        for (name, points), colour, marker in styles
    ]


def draw_line(
    axes: Any,
    points: Points,
    colour: str,
    marker: str,
    *,
    width: float = 1.8,
    size: float = 6.5,
) -> Any:
    """Draw a line with markers and its band; returns the handle."""
    places = [x for x, _, _ in points]
    axes.fill_between(  # draws nothing where the spread is NaN
        places,
        [y - spread for _, y, spread in points],
        [y + spread for _, y, spread in points],
        color=colour,
        alpha=0.14,
        linewidth=0,
    )
    (handle,) = axes.plot(
        places,
        [y for _, y, _ in points],
        color=colour,
        linewidth=width,
        marker=marker,
        markersize=size,
        markeredgecolor="white",
        markeredgewidth=0.8,
    )
    return handle


def draw_legend(axes: Any, entries: list[tuple[Any, str]]) -> None:
    """Name handles to the right of the axes, from top to bottom."""
    handles, names = zip(*entries, strict=True)
    axes.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0.0,
        frameon=False,
        labelcolor=_INK,
        labelspacing=0.7,
        handlelength=2.6,
    )
