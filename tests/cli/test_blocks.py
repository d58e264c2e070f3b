from torchprune_bayes.cli._blocks import in_blocks
from torchprune_bayes.reports import ResultsTable


def row(method, sparsity, accuracy, **more):
    measured = {"accuracy": accuracy, "nll": 1 - accuracy, "ece": (1 - accuracy) / 10}
    return {"method": method, "sparsity": sparsity, **measured, **more}


def test_a_line_per_method_and_a_column_per_sparsity():
    table = ResultsTable(
        [
            row("dense", 0.0, 0.99),
            row("a", 0.9, 0.7, seconds=1.0),
            row("a", 0.5, 0.9, seconds=2.0),
            row("b, 5 steps", 0.5, 0.8, seconds=0.25),
            {"method": "b, 5 steps", "sparsity": 0.9, "error": "ValueError: no"},
        ]
    )
    first, second, third = in_blocks(table).split("\n\n")
    assert first.splitlines() == [
        "Accuracy in % at each sparsity; seconds per run",
        "method       0.5   0.9  seconds  error",
        "----------  ----  ----  -------  ----------------------",
        "dense       99.0  99.0",
        "a           90.0  70.0     1.50",
        "b, 5 steps  80.0           0.25  at 0.9: ValueError: no",
    ]
    assert second.splitlines()[3:] == [
        "dense       0.01  0.01", "a           0.10  0.30", "b, 5 steps  0.20",
    ]  # fmt: skip
    assert third.splitlines()[3:] == [
        "dense       0.1  0.1", "a           1.0  3.0", "b, 5 steps  2.0",
    ]  # fmt: skip


def test_runs_are_averaged_over_seeds():
    table = ResultsTable(
        [row("dense", 0.0, 1.0), row("dense", 0.0, 0.9)]
        + [row("a", 0.5, accuracy, seconds=0.1) for accuracy in (0.5, 0.7)]
    )
    lines = in_blocks(table).splitlines()
    assert lines[3].split() == ["dense", "95.0", "±", "7.1"]
    assert lines[4].split() == ["a", "60.0", "±", "14.1", "0.1"]
