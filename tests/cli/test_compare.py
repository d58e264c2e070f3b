import csv
import json
import math
import warnings
from functools import cache

import pytest
import torch

from tests.html_page import read
from torchprune_bayes.cli import main
from torchprune_bayes.cli._blocks import in_blocks
from torchprune_bayes.cli._experiment import Trial, Variant, variants
from torchprune_bayes.cli._families import STEPWISE, families_of
from torchprune_bayes.cli.digits import load_digits, trained_network
from torchprune_bayes.errors import NumericalWarning
from torchprune_bayes.methods import Magnitude, registered_methods
from torchprune_bayes.methods.registry import _METHODS, register
from torchprune_bayes.reports import ResultsTable, evaluate

trained = cache(trained_network)
SMALL = ["--seeds", "1", "--num-samples", "32"]


@pytest.fixture(autouse=True)
def _trained_once(monkeypatch):
    monkeypatch.setattr("torchprune_bayes.cli.compare.trained_network", trained)


@pytest.fixture
def temporary_method():
    """Registers a method for one test."""
    names = []

    def add(name, kind):
        names.append(name)
        register(name, title="for one test", paper="", needs_calibration=False)(kind)

    yield add
    for name in names:
        del _METHODS[name]


class Failing(Magnitude):
    def decide(self, space):
        if self.amount > 0.6:
            raise RuntimeError("no way\nat all")
        return super().decide(space)


class Rescued(Magnitude):
    def decide(self, space):
        warnings.warn("jitter of 1e-3", NumericalWarning, stacklevel=1)
        return super().decide(space)


def compare(*words):
    return main(["compare", *map(str, words)])


def test_two_methods_at_two_sparsities(tmp_path, capsys):
    folder = tmp_path / "new" / "results"
    code = compare(
        "--methods", "magnitude", "woodfisher", "--sparsities", 0.5, 0.9, "--output", folder, *SMALL
    )
    out = capsys.readouterr().out
    assert code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "compare.csv", "compare.json", "compare.png", "config.yaml",
    ]  # fmt: skip
    rows = json.loads((folder / "compare.json").read_text())
    assert [(row["method"], row["sparsity"]) for row in rows] == [
        ("dense", 0.0),
        ("magnitude", 0.5),
        ("magnitude", 0.9),
        ("woodfisher", 0.5),
        ("woodfisher", 0.9),
    ]
    assert rows[0]["accuracy"] > 0.93
    assert rows[1]["accuracy"] > 0.9
    assert all(row["nll"] > 0 and 0 <= row["ece"] <= 1 for row in rows)
    assert all(row["test_samples"] == 497 and row["num_samples"] == 32 for row in rows)
    assert all(row["seconds"] > 0 for row in rows[1:])
    with open(folder / "compare.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in rows]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "no fine-tuning" in " ".join(out.split())
    assert "an estimate" in out
    lines = [line.split() for line in out.splitlines()]
    shown = [line[0] for line in lines if line and line[0] in ("dense", "magnitude", "woodfisher")]
    assert shown == ["dense", "magnitude", "woodfisher"] * 3
    assert f"{100 * rows[2]['accuracy']:.1f}" in out
    assert str(folder / "compare.png") in out


def test_a_method_that_fails_leaves_its_error_and_the_others_rows(
    tmp_path, capsys, temporary_method
):
    temporary_method("failing", Failing)
    code = compare(
        "--methods", "failing", "magnitude", "--sparsities", 0.5, 0.7, 0.9, "--output", tmp_path,
        *SMALL,
    )  # fmt: skip
    assert code == 1
    rows = json.loads((tmp_path / "compare.json").read_text())
    errors = {row["sparsity"]: row.get("error") for row in rows if row["method"] == "failing"}
    assert errors == {0.5: None, 0.7: "RuntimeError: no way at all", 0.9: errors[0.7]}
    assert sum(row["method"] == "magnitude" and "accuracy" in row for row in rows) == 3
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if "RuntimeError" in line)
    assert line.startswith("failing ")
    assert line.endswith("at 0.7: RuntimeError: no way at all (and 1 more)")
    assert (tmp_path / "compare.png").exists()


def test_when_every_method_fails_there_is_still_a_table(tmp_path, capsys, temporary_method):
    temporary_method("failing", Failing)
    code = compare("--methods", "failing", "--sparsities", 0.9, "--output", tmp_path, *SMALL)
    assert code == 1
    assert not (tmp_path / "compare.png").exists()
    assert "at 0.9: RuntimeError" in capsys.readouterr().out


def test_warnings_of_methods_are_shown_once_after_the_table(tmp_path, capsys, temporary_method):
    temporary_method("rescued", Rescued)
    words = ["--methods", "rescued", "--sparsities", 0.5, 0.6, "--output", tmp_path, "--no-plot"]
    assert compare(*words, *SMALL) == 0
    captured = capsys.readouterr()
    assert captured.out.count("warning: jitter of 1e-3") == 1
    assert captured.err == ""


def test_quiet_prints_the_table_alone(tmp_path, capsys):
    words = ["--methods", "random", "--sparsities", 0.5, "--output", tmp_path, "--no-plot"]
    assert compare(*words, *SMALL, "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "plan" not in captured.out
    assert "wrote" not in captured.out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "compare.csv", "compare.json", "config.yaml",
    ]  # fmt: skip


def test_json_prints_the_rows_alone(tmp_path, capsys):
    words = ["--methods", "random", "--sparsities", 0.5, "--output", tmp_path, "--no-plot"]
    assert compare(*words, *SMALL, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out) == json.loads((tmp_path / "compare.json").read_text())


def test_the_last_line_names_the_best_and_how_to_call_it(tmp_path, capsys):
    words = ["--methods", "random", "woodtaylor", "--steps", 2, "--sparsities", 0.8, 0.9]
    assert compare(*words, *SMALL, "--output", tmp_path, "--no-plot") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    rows = [row for row in json.loads((tmp_path / "compare.json").read_text()) if row["sparsity"]]
    means = {
        label: sum(row["accuracy"] for row in rows if row["method"] == label) / 2
        for label in ("random", "woodtaylor", "woodtaylor, 2 steps")
    }
    best = max(means, key=means.get)
    assert last.startswith(f"Best on these digits, {100 * means[best]:.1f} % on average: {best}.")
    assert f"prune --method {best.partition(',')[0]}" in last
    assert ("--options.steps 2" in last) == ("steps" in best)


def test_a_narrow_terminal_has_no_spread():
    table = ResultsTable()
    for seed in range(2):
        measured = {"nll": 0.1 + seed, "ece": 0.02, "seed": seed}
        table.add(method="dense", sparsity=0.0, accuracy=0.9 + 0.1 * seed, **measured)
        table.add(method="random", sparsity=0.5, accuracy=0.7, seconds=0.2, **measured)
    assert "±" in in_blocks(table)
    assert in_blocks(table, 200) == in_blocks(table)
    assert "±" not in in_blocks(table, 24)


def test_every_method_has_a_family():
    found = families_of(variants(None, None))
    assert set(found) == {variant.label for variant in variants(None, None)}
    assert "others" not in found.values(), "name a new method in cli/_families.py"
    assert found["woodtaylor, 8 steps"] == STEPWISE


def test_spread_is_over_seeds(tmp_path, capsys):
    words = ["--methods", "magnitude", "--sparsities", 0.8, "--output", tmp_path, "--no-plot"]
    assert compare(*words, "--seeds", 2) == 0
    rows = json.loads((tmp_path / "compare.json").read_text())
    first, second = (100 * row["accuracy"] for row in rows if row["method"] == "magnitude")
    mean, std = (first + second) / 2, abs(first - second) / math.sqrt(2)
    out = " ".join(capsys.readouterr().out.split())
    assert f"magnitude {mean:.1f} ± {std:.1f}" in out
    assert "mean ± standard deviation" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "nothing"], "Expected one of"),
        (["--sparsities", "1.0"], "Expected `--sparsities` in [0, 1), got 1.0."),
        (["--sparsities", "0"], "Expected `--sparsities` above 0"),
        (["--seeds", "0"], "Expected `--seeds` of at least 1, got 0."),
        (["--steps", "0"], "Expected `--steps` of at least 1, got 0."),
        (["--num-samples", "2000"], "Expected `--num-samples` of at most 1000, got 2000."),
    ],
)
def test_wrong_usage_is_told_before_anything_is_done(tmp_path, capsys, words, message):
    folder = tmp_path / "results"
    assert compare(*words, "--output", folder) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert not folder.exists()


def test_without_matplotlib_the_extra_is_named_before_anything_is_done(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torchprune_bayes._extras.find_spec", lambda package: None)
    assert compare("--output", tmp_path / "results") == 2
    err = capsys.readouterr().err
    assert "matplotlib" in err
    assert 'pip install ".[cli]"' in err


def test_by_default_all_methods_run_and_woodtaylor_in_several_steps_too():
    found = variants(None, None)
    assert [v.method for v in found if "," not in v.label] == [
        name for name, entry in registered_methods().items() if not entry.is_structured
    ]
    taylor = [(v.label, v.options) for v in found if v.method == "woodtaylor"]
    assert taylor == [("woodtaylor", {}), ("woodtaylor, 8 steps", {"steps": 8})]
    assert [v.label for v in found if "," in v.label] == ["woodtaylor, 8 steps"]


def test_slow_methods_are_limited_and_the_table_says_so(tmp_path, capsys):
    (limited,) = variants(["hessian-diagonal"], None)
    assert limited.options == {"probes": 32}
    words = ["--methods", "hessian-diagonal", "--sparsities", 0.5, "--no-plot"]
    assert compare(*words, "--output", tmp_path, *SMALL) == 0
    assert [v.options for v in variants(["force", "snip-it", "woodfisher"], None)] == [
        {"steps": 20}, {}, {},
    ]  # fmt: skip
    assert "hessian-diagonal with probes=32" in capsys.readouterr().out
    assert json.loads((tmp_path / "compare.json").read_text())[1]["options"] == "probes=32"


def test_steps_are_for_every_method_that_takes_them():
    names = ["magnitude", "woodfisher", "woodtaylor", "magnitude"]
    found = variants(names, 3)
    assert [v.label for v in found] == [
        "magnitude", "woodfisher", "woodfisher, 3 steps", "woodtaylor", "woodtaylor, 3 steps",
    ]  # fmt: skip
    assert [v.label for v in variants(names, 1)] == ["magnitude", "woodfisher", "woodtaylor"]


def test_a_trial_prunes_a_copy_to_the_sparsity():
    trial = Trial(trained(0), 0, 16)
    before = {name: value.clone() for name, value in trial.model.state_dict().items()}
    first = trial.pruned(Variant("random", "random"), 0.9)
    again = trial.pruned(Variant("random", "random"), 0.9)
    assert first["accuracy"] == again["accuracy"]
    assert first["accuracy"] < 0.6
    for name, value in trial.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert trial.dense()["nll"] == evaluate(trial.model, load_digits().test.batches()).nll


def test_the_number_of_threads_is_put_back(tmp_path, temporary_method):
    threads = torch.get_num_threads()
    temporary_method("failing", Failing)
    words = ["--methods", "failing", "--sparsities", 0.9, "--output", tmp_path, "--no-plot"]
    compare(*words, *SMALL)
    assert torch.get_num_threads() == threads


def test_the_second_part_shrinks_and_times(tmp_path, capsys):
    words = ["--methods", "magnitude", "--sparsities", 0.5, "--shrink", 0.5, "--report"]
    assert compare(*words, *SMALL, "--output", tmp_path) == 0
    rows = json.loads((tmp_path / "compare.json").read_text())
    [shrunk] = [row for row in rows if row["method"] == "shrink"]
    assert shrunk["flops"] >= 0.45
    assert shrunk["speedup"] > 0
    assert shrunk["accuracy"] > 0.9
    out = capsys.readouterr().out
    line = out.partition("Made smaller by `shrink`")[2].splitlines()[3].split()
    assert line[0] == "50"
    assert line[2] == f"{100 * shrunk['accuracy']:.1f}"
    assert (tmp_path / "shrink.png").read_bytes().startswith(b"\x89PNG")
    page = read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Accuracy against measured speed" in page.headings
    assert any(row[:2] == ["magnitude", "0.5"] for row in page.rows)
