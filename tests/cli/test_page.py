"""``--report`` of each command."""

import pytest

from tests.html_page import read
from torchprune_bayes.cli import main

pytest.importorskip("matplotlib")

TOYS = ["--model", "tests.cli.toys:make_model", "--data", "tests.cli.toys:make_batches"]
DIGITS = ["--model", "torchprune_bayes.cli.digits:trained_network", "--data", "digits"]


def run(folder, *words):
    assert main([*map(str, words), "--output", str(folder), "--report"]) == 0
    return read((folder / "report.html").read_text(encoding="utf-8"))


def test_pruning(tmp_path):
    page = run(
        tmp_path, "prune", *TOYS, "--method", "woodtaylor", "--amount", 0.5, "--num-samples", 40,
        "--options.steps", 2,
    )  # fmt: skip
    assert page.headings == [
        "tests.cli.toys:make_model pruned by woodtaylor", "Metrics", "Steps",
        "What was pruned where", "Confidence against accuracy", "Settings", "Versions", "Command",
    ]  # fmt: skip
    kept = [row for row in page.rows if row[1:2] == ["weights"]]
    assert [row[0] for row in kept] == ["0.weight", "2.weight"]
    assert sum(int(row[3]) for row in kept) == 60
    assert ["method", "woodtaylor"] in page.rows
    assert "--options.steps 2" in page.text


def test_pruning_without_data(tmp_path):
    page = run(tmp_path, "prune", *TOYS[:2], "--method", "magnitude", "--amount", 0.5)
    assert "Metrics" not in page.headings
    assert "What was pruned where" in page.headings


def test_shrinking(tmp_path):
    page = run(tmp_path, "shrink", *DIGITS, "--sparsity", 0.4, "--num-samples", 64)
    assert page.headings[1:5] == [
        "Metrics", "Size and latency", "What was pruned where",
        "Loss against removed units, group by group",
    ]  # fmt: skip
    assert {row[0] for row in page.rows if row[1:2] == ["channels"]} == {"0", "2"}
    assert any(row[0] == "forward pass in ms" for row in page.rows)


def test_without_matplotlib_nothing_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torchprune_bayes._extras.find_spec", lambda package: None)
    words = [*TOYS, "--method", "magnitude", "--amount", "0.5", "--output", str(tmp_path / "out")]
    assert main(["prune", *words, "--report"]) == 2
    assert 'pip install ".[cli]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
