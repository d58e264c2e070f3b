from __future__ import annotations

import csv
import json
import math
import statistics
import string
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.reports import ClassificationMetrics, ResultsTable

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(string.ascii_letters + " ,;\"'|\n\\éΩ", max_size=8)
ROWS = st.lists(st.dictionaries(TEXT.filter(bool), NUMBERS | TEXT, min_size=1), max_size=5)


def runs() -> ResultsTable:
    table = ResultsTable()
    for method, seed, accuracy in [("A_1", 0, 0.5), ("A_1", 1, 0.75), ("B|2", 0, 0.125)]:
        table.add(method=method, sparsity=0.9, seed=seed, accuracy=accuracy)
    return table


def summary() -> ResultsTable:
    return runs().summarise(by=["method", "sparsity"], values=["accuracy"])


def test_text():
    assert runs().to_text().splitlines() == [
        "method  sparsity  seed  accuracy",
        "------  --------  ----  --------",
        "A_1          0.9     0     0.500",
        "A_1          0.9     1     0.750",
        "B|2          0.9     0     0.125",
    ]


def test_text_of_a_summary():
    assert str(summary()).splitlines() == [
        "method  sparsity         accuracy  runs",
        "------  --------  ---------------  ----",
        "A_1          0.9  0.6250 ± 0.1768     2",
        "B|2          0.9  0.1250              1",
    ]


def test_markdown():
    assert summary().to_markdown().splitlines() == [
        "| method | sparsity |        accuracy | runs |",
        "| ------ | -------: | --------------: | ---: |",
        "| A_1    |      0.9 | 0.6250 ± 0.1768 |    2 |",
        r"| B\|2   |      0.9 | 0.1250          |    1 |",
    ]


def test_latex():
    assert summary().to_latex().splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & sparsity &            accuracy & runs \\",
        r"\midrule",
        r"A\_1   &      0.9 & 0.6250 $\pm$ 0.1768 &    2 \\",
        r"B|2    &      0.9 &     0.1250          &    1 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_escapes_every_special_character():
    table = ResultsTable([{"a": "\\&%$#_{}~^"}])
    escaped = r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}"
    assert escaped in table.to_latex()


def test_numbers_of_different_sizes_missing_and_not_finite():
    table = ResultsTable([{"damping": 1e-05, "nll": math.inf, "flops": 12}])
    table.add(damping=0.1, nll=2.0, note="retrained")
    table.add(damping=math.nan, nll=0.34567, flops=3)
    assert table.to_text().splitlines() == [
        "damping     nll  flops  note",
        "-------  ------  -----  ---------",
        "  1e-05     inf     12",
        "    0.1  2.0000         retrained",
        "    nan  0.3457      3",
    ]


def test_single_runs_have_no_spread_and_small_spreads_no_other_notation():
    table = ResultsTable([{"m": "a", "x": 0.5}, {"m": "b", "x": 0.25}])
    assert table.summarise(["m"], ["x"]).to_text().splitlines()[2:] == [
        "a  0.50     1",
        "b  0.25     1",
    ]
    table.add(m="b", x=0.2502)
    assert table.summarise(["m"], ["x"]).to_text().splitlines()[2:] == [
        "a  0.5000              1",
        "b  0.2501 ± 0.0001     2",
    ]


def test_columns_are_the_union_in_order():
    table = ResultsTable([{"b": 1}, {"a": 2, "b": 3}])
    assert table.columns == ["b", "a"]
    assert len(table) == 2
    assert list(table) == [{"b": 1}, {"a": 2, "b": 3}]


def test_rows_handed_out_are_copies():
    table = ResultsTable([{"a": 1}])
    next(iter(table))["a"] = 2
    assert list(table) == [{"a": 1}]


def test_metrics_make_a_row():
    metrics = ClassificationMetrics(accuracy=0.5, top5=1.0, nll=1.0, ece=0.1, brier=0.6, samples=8)
    table = ResultsTable()
    table.add(method="A", **asdict(metrics))
    assert table.columns == ["method", "accuracy", "top5", "nll", "ece", "brier", "samples"]


def test_summary_of_one_run_has_no_deviation():
    first, second = summary()
    assert first == pytest.approx(
        {"method": "A_1", "sparsity": 0.9, "runs": 2}
        | {"accuracy_mean": 0.625, "accuracy_std": math.sqrt(2) / 8}
    )
    assert second["runs"] == 1
    assert math.isnan(float(second["accuracy_std"]))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=10))
def test_summary_twin(values):
    table = ResultsTable({"x": value, "seed": seed} for seed, value in enumerate(values))
    (row,) = table.summarise(by=[], values=["x"])
    assert row["x_mean"] == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-9)
    assert row["x_std"] == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_summary_of_diverged_runs(bad):
    table = ResultsTable([{"x": 1.0}, {"x": bad}])
    (row,) = table.summarise(by=[], values=["x"])
    assert row["x_mean"] == pytest.approx(bad / 2, nan_ok=True)
    assert not math.isfinite(float(row["x_std"]))


def test_summary_needs_its_columns():
    with pytest.raises(ArgumentError, match="column 'seeds' in every row"):
        runs().summarise(by=["seeds"], values=["accuracy"])
    with pytest.raises(ArgumentError, match="numbers in column 'method'"):
        runs().summarise(by=["seed"], values=["method"])


@settings(deadline=None)
@given(ROWS)
def test_json_round_trip(rows):
    table = ResultsTable(rows)
    with tempfile.TemporaryDirectory() as folder:
        table.to_json(Path(folder) / "table.json")
        read = ResultsTable.from_json(Path(folder) / "table.json")
    assert list(read) == list(table)
    types = [[type(cell) for cell in row.values()] for row in table]
    assert [[type(cell) for cell in row.values()] for row in read] == types


def test_json_has_null_for_what_is_not_finite(tmp_path):
    ResultsTable([{"a": math.nan, "b": -math.inf, "self": 1}]).to_json(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == [{"a": None, "b": None, "self": 1}]
    (row,) = ResultsTable.from_json(tmp_path / "t.json")
    assert math.isnan(float(row["a"]))
    assert math.isnan(float(row["b"]))


@pytest.mark.parametrize("text", ['{"a": 1}', "[1, 2]", '[{"a": [1]}]'])
def test_json_of_another_shape(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises((ArgumentError, ArgumentTypeError), match="Expected"):
        ResultsTable.from_json(tmp_path / "t.json")


@settings(deadline=None)
@given(ROWS)
def test_csv_round_trip(rows):
    table = ResultsTable(rows)
    with tempfile.TemporaryDirectory() as folder:
        table.to_csv(Path(folder) / "table.csv")
        with open(Path(folder) / "table.csv", newline="", encoding="utf-8") as file:
            read = list(csv.DictReader(file))
    assert read == [{c: str(row.get(c, "")) for c in table.columns} for row in table]


@pytest.mark.parametrize("cell", [None, [1], torch.tensor(1.0)])
def test_cells_are_plain(cell):
    table = ResultsTable()
    with pytest.raises(ArgumentTypeError, match="column 'accuracy'"):
        table.add(accuracy=cell)
    assert len(table) == 0
