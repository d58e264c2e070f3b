"""Options from files: precedence, what is saved, and what is refused."""

import json

import pytest
import yaml

from torchprune_bayes.cli import main

CONFIG = """\
model: tests.cli.toys:make_model
data: tests.cli.toys:make_batches
method: woodtaylor
amount: 0.5
num_samples: 40
options: {steps: 2, damping: 1e-2}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG)
    return path


def prune(*words):
    return main(["prune", *map(str, words)])


def test_a_file_is_read_and_what_is_typed_has_precedence(tmp_path, config):
    out = tmp_path / "out"
    assert prune("--config", config, "--amount", 90, "--options.steps", 3, "--output", out) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["pruned"] == 90
    assert len(report["info"]["steps"]) == 3
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["amount"], saved["output"], saved["batch_size"]) == (90, str(out), 64)
    assert saved["options"]["damping"] == 1e-2


def test_the_saved_file_repeats_the_run(tmp_path, config):
    first, second = tmp_path / "first", tmp_path / "second"
    assert prune("--config", config, "--output", first) == 0
    assert prune("--config", first / "config.yaml", "--output", second) == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("command", ["compare", "shrink"])
def test_the_other_commands_save_theirs(tmp_path, command):
    words = {
        "compare": ["--methods", "random", "--sparsities", "0.5", "--no-plot", "--seeds", "1"],
        "shrink": [
            "--model", "tests.cli.toys:make_model", "--data", "tests.cli.toys:make_batches",
            "--sparsity", "0.5", "--importance", "random", "--num-samples", "20",
        ],
    }[command]  # fmt: skip
    assert main([command, *words, "--output", str(tmp_path)]) == 0
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["output"] == str(tmp_path)
    assert "config" not in saved


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("amoun: 0.7", "'amoun'"),
        ("amount: high", "Expected `amount` to be int or float, got 'high'"),
        ("seed: 1.5", "Expected `seed` to be int, got '1.5'"),
        ("[", "Problems parsing config: while scanning"),
    ],
)
def test_a_wrong_file_is_one_line_before_anything_runs(
    tmp_path, capsys, config, monkeypatch, line, message
):
    monkeypatch.setattr("torchprune_bayes.cli.prune.loaded", None)
    config.write_text(CONFIG + line + "\n")
    with pytest.raises(SystemExit, match="2"):
        prune("--config", config, "--output", tmp_path / "out")
    [last] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert message in last
    assert "`torchprune-bayes prune --help` lists what it takes." in last
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        prune("--config", "nowhere.yaml")
    assert "nowhere.yaml" in capsys.readouterr().err
