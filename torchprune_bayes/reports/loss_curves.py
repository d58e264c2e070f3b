"""A figure of measured loss curves: the cost of removing units from each group."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan
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
from torchprune_bayes.structured import LossCurve

_DECADE = 10
"""Losses that differ by fewer times, or are not positive, are drawn on a linear scale."""


def plot_loss_curves(
    curves: Sequence[LossCurve], path: str | PathLike[str], *, title: str | None = None
) -> Path:
    """Draw the loss of a model against the units removed from one of its groups, for each group.

    The scale is logarithmic if the losses are positive and differ by more than ten times.

    Args:
        curves: ``report.curves`` of :func:`~torchprune_bayes.structured.shrink`, or of
            :func:`~torchprune_bayes.structured.measure_curves`.
        path: File to write, ending in ``.png``, ``.svg`` or ``.pdf``.
        title: Heading, if any.

    Returns:
        The path written.

    Raises:
        ArgumentError: If the suffix is not one of these or there is no curve.
        MissingExtraError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> curve = LossCurve("layer1.conv1", 16, (0, 8, 15), (0.1, 0.2, 1.3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_loss_curves([curve], f"{folder}/curves.svg").name
        'curves.svg'
    """
    path = checked_path(path)
    if not curves:
        raise ArgumentError(
            "Expected loss curves to draw, got none: shrink with allocation='measured'."
        )
    figure, axes = new_figure("fraction of the units removed", "loss", title)
    drawn = [(curve.group, _points(curve)) for curve in curves]
    entries = draw_series(axes, drawn)
    losses = [loss for _, points in drawn for _, loss, _ in points]
    if losses and max(losses) > _DECADE * min(losses) > 0:
        axes.set_yscale("log")
    draw_legend(axes, entries)
    save_figure(figure, path)
    return path


def _points(curve: LossCurve) -> list[tuple[float, float, float]]:
    return [
        (removed / curve.units, loss, nan)
        for removed, loss in zip(curve.removed, curve.loss, strict=True)
        if isfinite(loss)
    ]
