"""The HTML page of ``--report``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchprune_bayes._extras import require
from torchprune_bayes.cli._measuring import Measured
from torchprune_bayes.reports import (
    HtmlReport,
    LayerChange,
    ResultsTable,
    plot_reliability,
)

Drawing = Callable[[Path], object]
"""Draws a figure into a file."""


def add_report_option(group: argparse._ActionsContainer) -> None:
    """Add ``--report``."""
    group.add_argument(
        "--report",
        action="store_true",
        help="also write report.html, one file that opens offline (needs matplotlib)",
    )


def check_report(arguments: argparse.Namespace) -> None:
    """Refuse ``--report`` before any work if figures cannot be drawn."""
    if arguments.report:
        require("matplotlib", "cli")


def write_page(
    arguments: argparse.Namespace,
    title: str,
    summary: Sequence[str],
    *,
    models: Mapping[str, Measured | None] | None = None,
    tables: Mapping[str, ResultsTable] | None = None,
    layers: Sequence[LayerChange] = (),
    drawings: Mapping[str, Drawing] | None = None,
) -> Path:
    """Write ``report.html`` into the folder of the results.

    Args:
        arguments: Arguments of the command, which are shown.
        title: Heading.
        summary: Sentences below it.
        models: Results of each model, by its name, for a table and a reliability diagram.
        tables: Further tables.
        layers: Sparsity of each layer.
        drawings: Further figures by their headings.
    """
    measured = {name: results for name, results in (models or {}).items() if results is not None}
    sure = {n: m.reliability for n, m in measured.items() if m.reliability is not None}
    drawings = dict(drawings or {})
    if sure:
        drawings["Confidence against accuracy"] = lambda path: plot_reliability(sure, path)
    with tempfile.TemporaryDirectory() as folder:
        figures = {}
        for number, (heading, draw) in enumerate(drawings.items()):
            figures[heading] = Path(folder, f"{number}.svg")
            draw(figures[heading])
        page = HtmlReport(
            title,
            summary,
            tables=({"Metrics": _side_by_side(measured)} if measured else {}) | dict(tables or {}),
            layers=layers,
            figures=figures,
            settings=settings_of(arguments),
            command=arguments.command,
        )
        return page.write(arguments.output / "report.html")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as they were resolved."""
    return {k: v for k, v in vars(arguments).items() if k not in ("command", "resolved", "config")}


def _side_by_side(models: Mapping[str, Measured]) -> ResultsTable:
    """A row for each metric, a column for each model."""
    first = next(iter(models.values()))
    table = ResultsTable()
    for name in first.metrics:
        table.add(
            metric=name, **{model: results.metrics[name] for model, results in models.items()}
        )
    return table
