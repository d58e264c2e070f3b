"""Figures of accuracy against compression."""

from __future__ import annotations

from typing import Any

import pytest

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports import ResultsTable, plot_accuracy_against_compression

pytest.importorskip("matplotlib.figure")


def curves(seeds: tuple[int, ...] = (0, 1)) -> ResultsTable:
    table = ResultsTable()
    for seed in seeds:
        for name, stop in (("BMRS_N", 0.4), ("L2", None)):
            for level in (1.0, 0.5, 0.0):
                gone = level * (0.8 + seed / 10)
                table.add(criterion=name, level=level, parameters=gone, metric=1 - gone / 2, stop=0)
            if stop is not None:
                gone = stop + seed / 10
                table.add(criterion=name, level=stop, parameters=gone, metric=0.9, stop=1)
    return table


def lines_of(figure: Any) -> dict[str, list[Any]]:
    """Lines with data by marker: curves have circles and squares, stops stars."""
    found: dict[str, list[Any]] = {}
    for line in figure.axes[0].lines:
        if len(line.get_xdata()):
            found.setdefault(str(line.get_marker()), []).append(line)
    return found


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_files(tmp_path, suffix, magic):
    path = plot_accuracy_against_compression(curves(), tmp_path / f"figure{suffix}")
    assert path.read_bytes().startswith(magic)


def test_levels_are_averaged_over_runs_and_drawn_from_left_to_right(drawn):
    plot_accuracy_against_compression(curves(), "a.png", title="MLP")
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Parameters removed", "Metric")
    [curve] = lines_of(drawn[0])["o"]
    assert list(curve.get_xdata()) == pytest.approx([0, 0.425, 0.85])
    assert list(curve.get_ydata()) == pytest.approx([1, 0.7875, 0.575])
    band = axes.collections[0].get_datalim(axes.transData)
    assert band.y0 == pytest.approx(0.575 - 0.05 / 2**0.5)
    assert [text.get_text() for text in axes.get_legend().texts] == [
        "BMRS_N",
        "L2",
        "stopping point",
    ]


def test_stopping_points_are_stars_with_ticks(drawn):
    plot_accuracy_against_compression(curves(), "a.png")
    marked = lines_of(drawn[0])
    [star] = marked["*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((0.45, 0.9))
    assert star.get_color() == marked["o"][0].get_color()
    assert [list(tick.get_xdata()) for tick in marked["None"] if len(tick.get_xdata()) == 2] == [
        [pytest.approx(0.45)] * 2
    ]


def test_one_run_and_no_stopping_point(drawn):
    table = ResultsTable(row for row in curves((0,)) if row["criterion"] == "L2")
    plot_accuracy_against_compression(table, "a.png", y="metric")
    assert "*" not in lines_of(drawn[0])
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().texts] == ["L2"]


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ArgumentError, match=r"path\.suffix.*got '\.gif'"):
        plot_accuracy_against_compression(curves(), tmp_path / "a.gif")
    with pytest.raises(ArgumentError, match="column 'flops'"):
        plot_accuracy_against_compression(curves(), tmp_path / "a.png", x="flops")
    with pytest.raises(ArgumentError, match="column 'stop'"):
        plot_accuracy_against_compression(ResultsTable([{"level": 0.0}]), tmp_path / "a.png")
    rows = ResultsTable(row for row in curves() if row["stop"])
    with pytest.raises(ArgumentError, match="`stop` 0"):
        plot_accuracy_against_compression(rows, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
