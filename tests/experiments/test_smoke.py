"""Every experiment runs through, small, on generated data of the layout that it asks for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.experiments import generated
from torchprune_bayes.cli import main
from torchprune_bayes.cli._options import checked_options
from torchprune_bayes.experiments import EXPERIMENTS
from torchprune_bayes.experiments.gated import PostTraining
from torchprune_bayes.experiments.weights import Method, SavedMasks
from torchprune_bayes.methods import find_method

pytest.importorskip("torchvision")
pytest.importorskip("timm")

WRITERS = {
    "mnist": generated.write_mnist,
    "fashion-mnist": lambda folder: generated.write_mnist(folder, name="FashionMNIST"),
    "cifar10": generated.write_cifar,
    "cifar100": lambda folder: generated.write_cifar(folder, label="fine_label"),
    "image folders": generated.write_folders,
    "texts": generated.write_texts,
}
TINY = ["--scale", "0.0005", "--width", "0.1"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folders by the name of the data."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = WRITERS[name](tmp_path_factory.mktemp(name.replace(" ", "_")))
        return made[name]

    return of


@pytest.fixture(scope="session")
def transformer(tmp_path_factory):
    """Folders with a small transformer of the kind of a published one, and its tokenizer."""
    return lambda hub: generated.write_transformer(tmp_path_factory.mktemp("model"), hub)


def methods_of(name):
    found = [getattr(row.pruning, "method", None) for row in EXPERIMENTS[name].rows]
    return [method for method in found if isinstance(method, Method)]


def with_first_targets(experiment):
    """One target of each row, and two criteria, are enough to see that it runs."""
    rows = [replace(row, published=dict([*row.published.items()][:1])) for row in experiment.rows]
    figures = [
        replace(figure, criteria=("bmrs-n", "l2")) if isinstance(figure, PostTraining) else figure
        for figure in experiment.figures
    ]
    return replace(experiment, rows=tuple(rows), figures=tuple(figures))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings_are_those_of_registered_methods(name):
    for method in methods_of(name):
        assert checked_options(method.name, method.options) == dict(method.options)
        assert find_method(method.name).needs_calibration == bool(method.samples)
    labels = [row.label for row in EXPERIMENTS[name].rows]
    assert len(set(labels)) == len(labels)
    assert all(row.published for row in EXPERIMENTS[name].rows)
    assert EXPERIMENTS[name].rows or EXPERIMENTS[name].figures


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_of_every_experiment_runs(tmp_path, data, capsys, monkeypatch, transformer, name):
    torch.manual_seed(0)
    experiment = with_first_targets(EXPERIMENTS[name])
    monkeypatch.setitem(EXPERIMENTS, name, experiment)
    words = ["--data", str(data(experiment.data)), "--output", str(tmp_path), *TINY]
    large = experiment.data == "image folders" or (experiment.size or 0) > 32
    size = ["--image-size", "8" if experiment.hub else "32"] if large else []
    if experiment.hub is not None:
        pytest.importorskip("transformers")
        words += ["--model", str(transformer(experiment.hub))]
    if any(method.name == "cbs" for method in methods_of(name)):
        words += ["--options.perturbations", "2", "--options.max_iterations", "2"]
    if name == "spam-wrn-cifar10":
        words += ["--width", "0.25"]  # wide enough for groups of four inputs
    assert main(["reproduce", name, *words, *size]) == 0
    printed = capsys.readouterr().out
    assert experiment.paper in printed
    assert experiment.title in printed
    assert (tmp_path / "config.yaml").is_file()
    for figure in experiment.figures:
        assert (tmp_path / f"{figure.name}.png").stat().st_size > 5000
        assert json.loads((tmp_path / f"{figure.name}.json").read_text())
    if not experiment.rows:
        return
    assert (tmp_path / "reproduce.tex").read_text().startswith("\\begin{tabular}")
    rows = json.loads((tmp_path / "reproduce.json").read_text())
    expected = {("dense", 0.0)} | {
        (row.label, target)
        for row in experiment.rows
        if not isinstance(row.pruning, SavedMasks)
        for target in row.published
    }
    assert {(row["label"], row.get("sparsity")) for row in rows} == expected
    for row in rows:
        assert 0 <= row["ours"] <= 100
