"""Formatting rows as aligned text, Markdown and LaTeX.

Written by hand, because most of it joins means with their spread and chooses decimals, which
neither pandas nor tabulate does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Cell: TypeAlias = str | int | float
Row: TypeAlias = dict[str, Cell]

_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$"}
)


def text(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Lay rows out for a terminal."""
    columns = _columns(rows, names)
    rule = ["-" * column.width for column in columns]
    lines = [_header(columns), rule, *_body(columns)]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def markdown(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Lay rows out as GitHub-flavoured Markdown."""
    columns = _columns(rows, names, lambda cell: cell.replace("|", r"\|"), least_width=3)
    rule = ["-" * (c.width - 1) + (":" if c.numeric else "-") for c in columns]
    lines = [_header(columns), rule, *_body(columns)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def columns_of(table: Iterable[Row]) -> list[Column]:
    """The columns as they are shown: formatted, means joined with their spread."""
    rows = list(table)
    return _columns(rows, list(dict.fromkeys(name for row in rows for name in row)))


def rows_of(table: Iterable[Row]) -> Iterator[list[tuple[Column, str]]]:
    """Each row as pairs of a column and the text of its cell."""
    columns = columns_of(table)
    for cells in zip(*(column.cells for column in columns), strict=True):
        yield list(zip(columns, cells, strict=True))


def latex(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Lay rows out as a LaTeX tabular with the rules of booktabs."""
    columns = _columns(rows, names, lambda cell: cell.translate(_LATEX))
    alignment = "".join("r" if column.numeric else "l" for column in columns)
    header, *body = (" & ".join(cells) + r" \\" for cells in [_header(columns), *_body(columns)])
    lines = [
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        header,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Column:
    """A column of formatted cells."""

    name: str
    cells: list[str]
    numeric: bool
    width: int

    def padded(self, cell: str) -> str:
        """The cell in the width of its column: numbers to the right, words to the left."""
        return cell.rjust(self.width) if self.numeric else cell.ljust(self.width)


def _columns(
    rows: Sequence[Row],
    names: Sequence[str],
    escape: Callable[[str], str] = str,
    least_width: int = 1,
) -> list[Column]:
    columns = []
    for name in names:
        stem, _, ending = name.rpartition("_")
        if ending == "std" and f"{stem}_mean" in names:
            continue  # shown with the mean
        values = [row.get(name) for row in rows]
        if ending == "mean" and f"{stem}_std" in names:
            name, cells = stem, _with_spread(values, [row.get(f"{stem}_std") for row in rows])
        else:
            cells = _formatted(values, _number_format(values))
        name, *cells = (escape(cell) for cell in [name, *cells])
        numeric = not any(isinstance(value, str) for value in values)
        width = max(map(len, [name, *cells, " " * least_width]))
        columns.append(Column(name, cells, numeric, width))
    return columns


def _header(columns: list[Column]) -> list[str]:
    return [column.padded(column.name) for column in columns]


def _body(columns: list[Column]) -> list[list[str]]:
    lines = zip(*(column.cells for column in columns), strict=True)
    return [[c.padded(cell) for c, cell in zip(columns, line, strict=True)] for line in lines]


def _number_format(values: Sequence[Cell | None]) -> str:
    """Pick the fewest decimals, up to four, that show all floats; 4 digits if sizes differ much."""
    floats = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    if any(value and not 1e-3 <= abs(value) < 1e6 for value in floats):
        return ".4g"
    decimals = [len(f"{value:.4f}".rstrip("0").partition(".")[2]) for value in floats]
    return f".{max([1, *decimals])}f"


def _formatted(values: Sequence[Cell | None], number_format: str) -> list[str]:
    return [
        format(value, number_format) if isinstance(value, float) else str(value)
        for value in ("" if value is None else value for value in values)
    ]


def _with_spread(means: Sequence[Cell | None], spreads: Sequence[Cell | None]) -> list[str]:
    """Join means and standard deviations; those of single runs, NaN, are left out."""
    # A spread below the last decimal must not turn the means into another notation.
    large = [spread for spread in spreads if isinstance(spread, float) and spread >= 1e-3]
    number_format = _number_format([*means, *large])
    shown = [None if spread is None or spread != spread else spread for spread in spreads]
    right = [f" ± {cell}" if cell else "" for cell in _formatted(shown, number_format)]
    width = max(map(len, right), default=0)
    left = _formatted(means, number_format)
    return [mean + spread.ljust(width) for mean, spread in zip(left, right, strict=True)]
