"""A run as one HTML file that opens anywhere, offline: layers, metrics, figures, settings."""

from __future__ import annotations

import base64
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from torchprune_bayes._files import write_whole
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports import layout
from torchprune_bayes.reports.tables import ResultsTable

_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class LayerChange:
    """Sparsity of a layer, or of a group of units.

    Attributes:
        name: The tensor or the group.
        counted: What is counted: ``"weights"``, ``"channels"``, ...
        before: How many there were.
        after: How many remain.
    """

    name: str
    counted: str
    before: int
    after: int

    @property
    def sparsity(self) -> float:
        """The fraction that was removed, 0 where there was nothing."""
        return 1.0 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class HtmlReport:
    """Content of the file, from top to bottom; empty parts are left out.

    Attributes:
        title: Heading of the page.
        summary: Sentences below it.
        tables: Tables by their headings, such as the metrics before and after.
        layers: Sparsity of each layer.
        figures: ``.svg`` or ``.png`` files by their headings; their content is embedded.
        settings: Settings of the run.
        command: The command line.

    Example:
        >>> import tempfile
        >>> layers = [LayerChange("fc1.weight", "weights", 1000, 50)]
        >>> report = HtmlReport("MLPNet at 95 %", ["Pruned by WoodFisher."], layers=layers)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = report.write(f"{folder}/report.html").read_text()
        >>> "95.0%" in text
        True
    """

    title: str
    summary: Sequence[str] = ()
    tables: Mapping[str, ResultsTable] = field(default_factory=dict)
    layers: Sequence[LayerChange] = ()
    figures: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    def render(self) -> str:
        """Write the page as a string; all content is escaped.

        Raises:
            ArgumentError: If a figure is neither SVG nor PNG.
        """
        environment = Environment(
            loader=PackageLoader("torchprune_bayes", "reports"),
            autoescape=True,
            undefined=StrictUndefined,
        )
        return environment.get_template("html_report.html.jinja").render(
            report=self,
            figures={heading: _embedded(path) for heading, path in self.figures.items()},
            listings={"Settings": self.settings, "Versions": versions()},
            columns_of=layout.columns_of,
            rows_of=layout.rows_of,
        )

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the page to a file; an existing one is replaced.

        Raises:
            ArgumentError: If a figure is neither SVG nor PNG.
        """
        page, path = self.render(), Path(path)
        write_whole(path, lambda draft: draft.write_text(page, encoding="utf-8"))
        return path


def versions() -> dict[str, str]:
    """Environment of a run: Python, torch, this package, the machine and its devices.

    Example:
        >>> sorted(versions())
        ['accelerator', 'machine', 'python', 'threads', 'torch', 'torchprune_bayes']
    """
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "torchprune_bayes": version("torchprune_bayes"),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "accelerator": accelerator,
    }


def _embedded(path: Path) -> str:
    media = _MEDIA.get(path.suffix.lower())
    if media is None:
        raise ArgumentError(f"Expected a figure that ends in .svg or .png, got {str(path)!r}.")
    return f"data:{media};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
