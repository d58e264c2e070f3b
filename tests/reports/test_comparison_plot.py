import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports import ResultsTable, plot_comparison
from torchprune_bayes.reports.comparison_plot import _apart, _by_family, _Line

pytest.importorskip("matplotlib")


def lines(**means):
    return [_Line(name, [0.3, 1.0], values) for name, values in means.items()]


def test_the_best_of_a_family_has_the_highest_mean():
    found = _by_family(
        lines(a=[0.9, 0.1], b=[0.8, 0.6], c=[1.0, 0.9]), {"a": "first", "b": "first"}
    )
    assert {family: [line.name for line in group] for family, group in found.items()} == {
        "c": ["c"],
        "first": ["b", "a"],
    }


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_labels_keep_their_order_and_are_apart(heights, gap):
    heights = sorted(heights, reverse=True)
    moved = _apart(heights, gap)
    assert len(moved) == len(heights)
    assert all(a - b >= gap - 1e-9 for a, b in itertools.pairwise(moved))
    if all(a - b >= gap for a, b in itertools.pairwise(heights)):
        assert moved == pytest.approx(heights)


def test_a_figure_is_written_with_the_names_in_it(tmp_path):
    table = ResultsTable([{"method": "dense", "sparsity": 0.0, "accuracy": 0.9}])
    for name, accuracy in [("one", 0.8), ("two", 0.7), ("three", 0.2)]:
        for sparsity in (0.5, 0.9):
            table.add(method=name, sparsity=sparsity, accuracy=accuracy - 0.1 * sparsity)
    path = plot_comparison(table, tmp_path / "all.png", {"one": "numbers", "two": "numbers"})
    assert path.read_bytes().startswith(b"\x89PNG")
    single = ResultsTable([{"method": "one", "sparsity": 0.5, "accuracy": 0.9}])
    assert plot_comparison(single, tmp_path / "single.svg", {}).exists()


def test_a_table_without_pruned_rows_is_refused(tmp_path):
    table = ResultsTable([{"method": "dense", "sparsity": 0.0, "accuracy": 0.9}])
    with pytest.raises(ArgumentError, match="sparsity above 0"):
        plot_comparison(table, tmp_path / "all.png", {})
