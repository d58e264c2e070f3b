from __future__ import annotations

import sys
from itertools import combinations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchprune_bayes.errors import ArgumentError, MissingExtraError
from torchprune_bayes.reports import ResultsTable, plot_accuracy_against_sparsity

pytest.importorskip("matplotlib.figure")

SPARSITIES = [0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.905, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999]


def runs(sparsities: tuple[float, ...] = (0.5, 0.9, 0.99)) -> ResultsTable:
    table = ResultsTable()
    table.add(method="dense", sparsity=0.0, seed=0, accuracy=0.95)
    for sparsity in sparsities:
        table.add(method="single", sparsity=sparsity, seed=0, accuracy=0.9 - sparsity / 3)
        for seed in (0, 1):
            table.add(method="double", sparsity=sparsity, seed=seed, accuracy=0.8 + seed / 10)
    return table


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
)
def test_formats_by_suffix(tmp_path, suffix, magic):
    path = plot_accuracy_against_sparsity(runs(), tmp_path / f"figure{suffix}")
    assert path == tmp_path / f"figure{suffix}"
    assert path.read_bytes().startswith(magic)


def test_pyplot_is_not_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    assert plot_accuracy_against_sparsity(runs(), str(tmp_path / "figure.png")).exists()


def test_lines_bands_and_reference(drawn):
    plot_accuracy_against_sparsity(runs(), "figure.png", title="LeNet")
    (axes,) = drawn[0].axes
    single, double, dense = axes.lines
    assert list(single.get_xdata()) == pytest.approx([0.30103, 1, 2], abs=1e-5)
    assert list(single.get_ydata()) == pytest.approx([0.9 - s / 3 for s in (0.5, 0.9, 0.99)])
    assert list(double.get_ydata()) == pytest.approx([0.85] * 3)
    assert list(dense.get_ydata()) == pytest.approx([0.95] * 2)
    no_band, band = (collection.get_datalim(axes.transData) for collection in axes.collections)
    assert (band.y0, band.y1) == pytest.approx((0.85 - 0.005**0.5, 0.85 + 0.005**0.5))
    assert not no_band.height > 0
    assert [text.get_text() for text in axes.get_legend().texts] == ["dense", "double", "single"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Sparsity", "Accuracy")
    assert axes.get_title(loc="left") == "LeNet"


def test_order_of_the_rows_does_not_matter(drawn):
    for table in (runs((0.5, 0.9, 0.99)), runs((0.99, 0.5, 0.9))):
        plot_accuracy_against_sparsity(table, "figure.png")
    first, second = (figure.axes[0].lines[0].get_xydata() for figure in drawn)
    assert (first == second).all()


def test_without_dense_rows_there_is_no_reference(drawn):
    table = ResultsTable(row for row in runs() if row["sparsity"] != 0)
    plot_accuracy_against_sparsity(table, "figure.png")
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().texts] == ["double", "single"]


def test_other_columns(drawn):
    table = ResultsTable([{"rule": "a", "flop_reduction": 0.5, "nll": 1.5}])
    plot_accuracy_against_sparsity(table, "a.svg", x="flop_reduction", y="nll", series="rule")
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Flop reduction", "Nll")
    assert list(axes.lines[0].get_ydata()) == [1.5]


def test_many_series_can_be_told_apart(drawn):
    rows = ({"method": f"m{i}", "sparsity": 0.9, "accuracy": i / 40} for i in range(40))
    plot_accuracy_against_sparsity(ResultsTable(rows), "figure.png")
    lines = drawn[0].axes[0].lines
    assert len({line.get_color() for line in lines[:12]}) == 12
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 40


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.sampled_from(SPARSITIES), min_size=1, unique=True))
def test_tick_labels_do_not_overlap(drawn, sparsities):
    plot_accuracy_against_sparsity(runs(tuple(sparsities)), "figure.png")
    figure = drawn[-1]
    figure.canvas.draw()
    axes = figure.axes[0]
    ticks = axes.get_xticklabels()
    assert f"{max(sparsities):g}" in {tick.get_text() for tick in ticks}
    boxes = [tick.get_window_extent() for tick in ticks]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert axes.get_legend().get_window_extent().x0 > axes.bbox.x1


@pytest.mark.parametrize("sparsity", [1.0, -0.1, "0.9", float("nan")])
def test_sparsities_that_cannot_be_drawn(sparsity, tmp_path):
    table = ResultsTable([{"method": "a", "sparsity": sparsity, "accuracy": 0.5}])
    with pytest.raises(ArgumentError, match=r"sparsities in \[0, 1\)"):
        plot_accuracy_against_sparsity(table, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw():
    with pytest.raises(ArgumentError, match="sparsity above 0"):
        plot_accuracy_against_sparsity(runs(()), "figure.png")
    with pytest.raises(ArgumentError, match="column 'loss'"):
        plot_accuracy_against_sparsity(runs(), "figure.png", y="loss")


def test_unknown_suffix():
    with pytest.raises(ArgumentError, match=r"path\.suffix.*got '\.gif'"):
        plot_accuracy_against_sparsity(runs(), "figure.gif")


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'pip install "\.\[plots\]"'):
        plot_accuracy_against_sparsity(runs(), "figure.png")
