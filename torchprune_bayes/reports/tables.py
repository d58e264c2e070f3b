"""Tables of results: collected row by row, summarised over seeds, written in five formats."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.reports import layout
from torchprune_bayes.reports.layout import Cell, Row


class ResultsTable:
    """Flat rows of results, one per run.

    Columns appear in the order in which rows first name them; rows may lack some. In the
    printed forms the columns ``x_mean`` and ``x_std`` of a summary become one column ``x`` with
    cells such as ``0.9120 ± 0.0031``.

    Args:
        rows: Initial rows.

    Raises:
        ArgumentTypeError: If a cell is not a plain string, integer or float.

    Example:
        >>> from torchprune_bayes.reports import ResultsTable
        >>> table = ResultsTable()
        >>> table.add(method="WoodFisher", sparsity=0.9, seed=0, accuracy=0.75)
        >>> table.add(method="WoodFisher", sparsity=0.9, seed=1, accuracy=0.77)
        >>> table.add(method="Magnitude", sparsity=0.9, seed=0, accuracy=0.7)
        >>> print(table.summarise(by=["method", "sparsity"], values=["accuracy"]))
        method      sparsity         accuracy  runs
        ----------  --------  ---------------  ----
        WoodFisher       0.9  0.7600 ± 0.0141     2
        Magnitude        0.9  0.7000              1
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows: list[Row] = []
        for row in rows:
            self.add(**row)

    def add(self, /, **row: Cell) -> None:
        """Append one row.

        Args:
            **row: Column name to string, integer or float; ``**dataclasses.asdict(metrics)``
                fits.

        Raises:
            ArgumentTypeError: If a cell is anything else, such as a tensor.
        """
        for column, cell in row.items():
            if not isinstance(cell, (str, int, float)):
                raise ArgumentTypeError(
                    f"Expected a str, int or float in column {column!r}, got {type(cell).__name__}."
                )
        self._rows.append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return (dict(row) for row in self._rows)

    def __str__(self) -> str:
        return self.to_text()

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in the order of their first appearance."""
        return list(dict.fromkeys(column for row in self._rows for column in row))

    def summarise(self, by: Sequence[str], values: Sequence[str]) -> ResultsTable:
        """Average over the rows that are equal in some columns, usually all but the seed.

        Args:
            by: Columns that define the groups.
            values: Columns of numbers to average.

        Returns:
            One row per group, in the order of first appearance: the columns of ``by``, then for
            each value ``<value>_mean`` and ``<value>_std``, then ``runs``, the number of rows.
            The standard deviation is that of a sample (divided by runs - 1) and NaN for one run.

        Raises:
            ArgumentError: If a row lacks one of the columns or a value is a string.
        """
        groups: dict[tuple[Cell, ...], list[Row]] = {}
        for row in self._rows:
            _check_row(row, by, values)
            groups.setdefault(tuple(row[column] for column in by), []).append(row)
        summary = ResultsTable()
        for key, rows in groups.items():
            cells: Row = dict(zip(by, key, strict=True))
            for value in values:
                mean, std = _mean_and_std([float(row[value]) for row in rows])
                cells |= {f"{value}_mean": mean, f"{value}_std": std}
            summary.add(**cells, runs=len(rows))
        return summary

    def to_text(self) -> str:
        """Format the table for a terminal: text to the left, numbers to the right.

        Returns:
            The lines, the last one without a line break.
        """
        return layout.text(self._rows, self.columns)

    def to_markdown(self) -> str:
        """Write the table as GitHub-flavoured Markdown, readable unrendered too.

        Returns:
            The lines, the last one without a line break.
        """
        return layout.markdown(self._rows, self.columns)

    def to_latex(self) -> str:
        r"""Write the table as a LaTeX ``tabular``; needs ``\usepackage{booktabs}``.

        Returns:
            The lines, the last one without a line break.
        """
        return layout.latex(self._rows, self.columns)

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write the rows as a JSON list of objects.

        NaN and infinities become ``null``, as JSON has neither.

        Args:
            path: File to write; an existing one is replaced.
        """
        rows = [{column: _finite_or_none(cell) for column, cell in row.items()} for row in self]
        text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> ResultsTable:
        """Read what :meth:`to_json` wrote.

        Args:
            path: File to read.

        Returns:
            An equal table, where ``null`` has become NaN.

        Raises:
            ArgumentError: If the file does not hold a list of objects.
            ArgumentTypeError: If an object is not flat.
        """
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ArgumentError(f"Expected a JSON list of objects, got another shape in {path}.")
        return cls({k: math.nan if v is None else v for k, v in row.items()} for row in rows)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the rows as CSV with a header; floats in full, missing cells empty.

        Args:
            path: File to write; an existing one is replaced.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self._rows)


def _check_row(row: Row, by: Sequence[str], values: Sequence[str]) -> None:
    for column in [*by, *values]:
        if column not in row:
            raise ArgumentError(f"Expected a column {column!r} in every row, got the row {row}.")
    for column in values:
        if isinstance(row[column], str):
            raise ArgumentError(
                f"Expected numbers in column {column!r} to average, got {row[column]!r}."
            )


def _mean_and_std(values: list[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; NaN and infinities propagate, never raise."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    squares = sum((value - mean) * (value - mean) for value in values)
    return mean, math.sqrt(squares / (len(values) - 1))


def _finite_or_none(cell: Cell) -> Cell | None:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell
