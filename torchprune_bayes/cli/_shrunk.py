"""The second part of ``compare``: smaller networks, their accuracy and their measured speed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from torchprune_bayes.cli._experiment import Trial, measured
from torchprune_bayes.cli.digits import load_digits
from torchprune_bayes.reports import ResultsTable, compare_speed
from torchprune_bayes.reports.plots import COLOURS, blank_figure, save_figure, style_axes
from torchprune_bayes.structured import shrink

DEFAULT = (0.3, 0.5, 0.7)
"""Fractions of the FLOPs that are removed."""

METHOD = "shrink"
"""What these rows are called."""

_PAIRS = 25  # of passes; the whole test set each, so that a pass is no shorter than the clock


def shrunk_row(trial: Trial, sparsity: float) -> dict[str, Any]:
    """Shrink a copy of the network by its measured loss, and time it beside the whole one."""
    smaller, images = copy.deepcopy(trial.model), load_digits().test.inputs
    begin = perf_counter()
    report = shrink(
        smaller, images[:1], trial.calibration(smaller), sparsity=sparsity, target="flops"
    )
    seconds = perf_counter() - begin
    assert report.flops is not None
    return {
        "method": METHOD,
        "sparsity": sparsity,
        "seed": trial.seed,
        "num_samples": trial.num_samples,
        **measured(smaller),
        "seconds": seconds,
        "parameters": report.parameters.sparsity,
        "flops": report.flops.sparsity,
        "speedup": compare_speed(trial.model, smaller, images, pairs=_PAIRS).speedup,
    }


def in_lines(table: ResultsTable, dense: float) -> str:
    """Format the shrunk networks for a terminal, averaged over seeds.

    Args:
        table: Rows of :func:`shrunk_row`.
        dense: Accuracy of the whole networks.

    Example:
        >>> table = ResultsTable()
        >>> table.add(sparsity=0.5, accuracy=0.97, parameters=0.48, speedup=1.5)
        >>> print(in_lines(table, 0.98))
        Made smaller by `shrink`, no fine-tuning; accuracy of the whole network: 98.0 %
        removed FLOPs in %  removed parameters in %  accuracy in %  speed-up
        ------------------  -----------------------  -------------  --------
                        50                     48.0           97.0       1.5
    """
    shown = ResultsTable()
    for row in _means(table):
        shown.add(
            **{
                "removed FLOPs in %": round(100 * float(row["sparsity"])),
                "removed parameters in %": round(100 * float(row["parameters_mean"]), 1),
                "accuracy in %": round(100 * float(row["accuracy_mean"]), 1),
                "speed-up": round(float(row["speedup_mean"]), 2),
            }
        )
    heading = "Made smaller by `shrink`, no fine-tuning; accuracy of the whole network: "
    return f"{heading}{100 * dense:.1f} %\n{shown}"


def plot_shrunk(table: ResultsTable, dense: float, path: Path) -> Path:
    """Draw accuracy against measured speed; each point is named by the removed FLOPs."""
    figure = blank_figure(7.0, 4.0, layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, "speed-up of a forward pass, measured", "accuracy", "Smaller networks")
    axes.axhline(dense, color="#767676", linestyle=(0, (5, 3)), linewidth=1.0)
    means = _means(table)
    speeds = [1.0, *(float(row["speedup_mean"]) for row in means)]
    heights = [dense, *(float(row["accuracy_mean"]) for row in means)]
    axes.plot(speeds, heights, color=COLOURS[0], marker="o", linewidth=2.0)
    names = ["whole", *(f"-{float(row['sparsity']):.0%} FLOPs" for row in means)]
    for name, x, y in zip(names, speeds, heights, strict=True):
        axes.annotate(
            name, (x, y), xytext=(5, 6), textcoords="offset points", fontsize=9, color=COLOURS[0]
        )
    axes.margins(x=0.15, y=0.2)
    save_figure(figure, path)
    return path


def _means(table: ResultsTable) -> Sequence[dict[str, Any]]:
    return list(table.summarise(["sparsity"], ["accuracy", "parameters", "speedup"]))
