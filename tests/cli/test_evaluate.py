import json

import pytest

from tests.html_page import read
from torchprune_bayes.cli import main

pytest.importorskip("foolbox")
DIGITS = ["--model", "torchprune_bayes.cli.digits:trained_network", "--data", "digits"]
TOYS = ["--model", "tests.cli.toys:make_model", "--data", "tests.cli.toys:make_batches"]


def evaluate(*words):
    return main(["evaluate", *map(str, words)])


def test_dense_masked_and_shrunk_side_by_side(tmp_path, capsys):
    pruned, shrunk, out = (tmp_path / name for name in ("pruned", "shrunk", "out"))
    words = ["--method", "magnitude", "--amount", "0.5", "--output", str(pruned)]
    assert main(["prune", *DIGITS, *words]) == 0
    words = ["--sparsity", "0.4", "--importance", "l1filter", "--output", str(shrunk)]
    assert main(["shrink", *DIGITS, *words]) == 0
    words = ["--attack", "fgsm", "--epsilons", 0.05, "--num-samples", 64, "--report"]
    assert evaluate(*DIGITS, "--pruned", pruned, shrunk, *words, "--output", out) == 0
    rows = json.loads((out / "evaluate.json").read_text())
    assert [row["model"] for row in rows] == ["dense", str(pruned), str(shrunk)]
    for row, folder in zip(rows[1:], (pruned, shrunk), strict=True):
        report = json.loads((folder / "report.json").read_text())
        assert row["accuracy"] == pytest.approx(report["metrics"]["after"]["accuracy"])
    assert rows[1]["zeros"] == pytest.approx(0.5 * 3784 / 3818, abs=1e-3)
    assert rows[2]["parameters"] < rows[0]["parameters"]
    attacked = json.loads((out / "attacked.json").read_text())
    assert [(row["model"], row["epsilon"]) for row in attacked] == [
        (row["model"], epsilon) for row in rows for epsilon in (0.0, 0.05)
    ]
    assert "under attack, 64 samples" in capsys.readouterr().out
    page = read((out / "report.html").read_text(encoding="utf-8"))
    assert "Accuracy against the strength of fgsm" in page.headings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (TOYS[:2], "Expected --data to measure with, got none."),
        ([*TOYS, "--pruned", "nowhere"], "Expected model.safetensors of `prune` or shrunk.json"),
        ([*TOYS, "--pruned", "a", "a"], "Expected different folders"),
        ([*TOYS, "--bounds", "1", "0"], "Expected `--bounds` LOW below HIGH, got 1 and 0."),
        ([*TOYS, "--attack", "pgd"], "Expected pixels in `bounds` [0, 1], got values from"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, capsys, words, message):
    assert evaluate(*words, "--output", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
