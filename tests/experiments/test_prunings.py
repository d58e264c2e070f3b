"""Each way to prune does what it says: sparsities, cuts, what is counted, what is matched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.description import Experiment, Recipe, Row, without_numbers
from torchprune_bayes.experiments.engine import Run
from torchprune_bayes.experiments.examples import Examples, Split
from torchprune_bayes.experiments.gated import Gated, Gates
from torchprune_bayes.experiments.marginal import Online, Prior, SpaMTrained
from torchprune_bayes.experiments.networks import perceptron
from torchprune_bayes.experiments.regularised import Decorated, Penalised, WeightsAndUnits
from torchprune_bayes.experiments.starts import Trained, Untrained
from torchprune_bayes.experiments.trial import Setting
from torchprune_bayes.experiments.units import Cut, CutDuring, Importance
from torchprune_bayes.experiments.weights import (
    Before,
    During,
    Halving,
    Method,
    OneShot,
    Polynomial,
    Rewinding,
)
from torchprune_bayes.reports import ResultsTable

RECIPE = Recipe(12, "sgd", 0.05, 32, momentum=0.9)
OPD = Method("opd", 64)


def split(*shape: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, *shape, generator=generator)
    y = x.flatten(1)[:, :3].argmax(1)
    return Split(Examples(x[:128], y[:128]), Examples(x[128:], y[128:]), 3)


def run(row: Row, *more: Row, shape=(12,), network=None, **setting):
    """Rows of an experiment after the dense one."""
    experiment = Experiment(
        title="",
        paper="",
        data="",
        network=network or partial(perceptron, hidden=[16, 16]),
        recipe=RECIPE,
        rows=(row, *more),
    )
    dense, *rows = Run(experiment, split(*shape), Setting(**setting)).rows()
    assert dense["label"] == "dense"
    return rows


def row(pruning, start=None, target=0.75, label="row"):
    return Row(label, start or Trained(), pruning, without_numbers(target))


WEIGHTS, ALL = 12 * 16 + 16 * 16 + 16 * 3, 12 * 16 + 16 * 16 + 16 * 3 + 16 + 16 + 3


@pytest.mark.parametrize(
    ("pruning", "start"),
    [
        (OneShot(Method("magnitude")), Trained()),
        (OneShot(Method("magnitude"), tune=2), Trained()),
        (Before(Method("snip-it", 64)), Untrained()),
        (During(Method("magnitude"), Polynomial(1, 9, 2), decay_after=False), Trained()),
        (During(Method("snip-it", 64, options={"steps": 0}), Halving(1, 1)), Untrained()),
        (Rewinding(remember=1, rounds=1), Untrained()),
        (OneShot(OPD), SpaMTrained(Prior(every=2, samples=64))),
        (Online(Prior(every=2, samples=64), every=2), Untrained()),
        (Online(Prior(every=2, samples=64), "posterior", every=2), Untrained()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_as_many_weights_are_pruned_as_asked(pruning, start):
    [found] = run(row(pruning, start))
    assert found["compression"] == pytest.approx(100 * 0.75 * WEIGHTS / ALL, abs=0.9)
    assert found["flops"] == 100.0  # zeros save nothing
    again = isinstance(start, Trained) and not (isinstance(pruning, OneShot) and not pruning.tune)
    assert (found["training_flops"] > 100.0) == again


def test_a_pattern_leaves_layers_out_that_it_does_not_fit():
    pruning = OneShot(Method("opd", 64, options={"pattern": "2:4"}))
    [found] = run(row(pruning, target=0.5), network=partial(perceptron, hidden=[16, 15]))
    all_, fits = 12 * 16 + 16 * 15 + 15 * 3 + 16 + 15 + 3, 12 * 16 + 16 * 15
    assert found["compression"] == pytest.approx(100 * 0.5 * fits / all_, abs=0.9)


@pytest.mark.parametrize(
    ("pruning", "start"),
    [
        (Cut(Importance("random"), by_layer=True), Untrained()),
        (Cut(Importance("snap-it", 64), stepwise=True), Untrained()),
        (CutDuring(Importance("snap-it", 64), Halving(1, 1)), Untrained()),
        (Cut(Importance("l1"), by_layer=True, tune=2), Trained(epochs=10)),
        (Cut(Importance("opd"), tune=2), SpaMTrained(Prior(every=4, samples=64))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_units_are_cut_and_the_training_costs_less(pruning, start):
    [found] = run(row(pruning, start))
    assert 50 < found["compression"] < 90
    assert found["flops"] < 50
    assert found["training_flops"] < 120  # with a whole training before, 100 of these
    if isinstance(start, Untrained) and isinstance(pruning, Cut):
        assert found["training_flops"] == pytest.approx(found["flops"], abs=0.1)


def test_units_need_a_posterior_for_opd():
    with pytest.raises(ArgumentError, match="Expected a start with a posterior"):
        run(row(Cut(Importance("opd")), Trained()))


def test_weights_and_units_together():
    [found] = run(row(WeightsAndUnits(64), Untrained(), 0.8))
    assert found["compression"] == pytest.approx(80, abs=5)
    assert found["flops"] < 100


def test_gate_decorators_cut_channels():
    [found] = run(
        row(Decorated(tick=2, tock=1, increment=0.3, tune=1), target=0.5),
        shape=(1, 8, 8),
        network=_normed,
    )
    assert 30 < found["compression"] < 80
    assert found["flops"] < 80


def _normed(shape, classes, width):
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()),
        nn.Linear(12 * 36, classes),
    )


def test_a_group_penalty_decides_itself_how_much_goes():
    [weak] = run(row(Penalised(1e-6, before=6, tune=1), Untrained(), None))
    [strong] = run(row(Penalised(0.1, before=6, threshold=0.1, tune=1), Untrained(), None))
    assert weak["compression"] == 0.0
    assert strong["compression"] > 5.0
    assert "sparsity" in weak
    [small] = run(row(Penalised(2e-3, False, before=6, threshold=0.05), Untrained(), None))
    assert small["compression"] > 20.0


def test_gates_close_units_and_another_row_matches_them():
    gates = Gates(multiplier=100.0)
    first = row(Gated("bmrs-n", gates=gates), Untrained(), None, "first")
    matched = Gated("l2", continuous=False, matched="first", gates=gates)
    one, two = run(first, row(matched, Untrained(), None, "second"))
    assert 0 < one["closed"] < 100
    assert two["closed"] == pytest.approx(one["closed"], abs=4)
    given = ResultsTable([{"label": "first", "seed": 0, "closed": 25.0}])
    *_, third = run(first, row(matched, Untrained(), None, "second"), matched=given)
    assert third["closed"] == pytest.approx(25.0, abs=4)
    with pytest.raises(ArgumentError, match=r"Expected a row `first` with the column `closed`"):
        run(row(matched, Untrained(), None))


def test_the_same_setting_gives_the_same_numbers():
    wanted = row(Before(Method("snip", 64)), Untrained())
    first, second = (run(wanted, seeds=1) for _ in range(2))
    assert first == second


def test_seeds_of_one_network_draw_samples_alone():
    experiment = Experiment(
        title="",
        paper="",
        data="",
        network=partial(perceptron, hidden=[8]),
        recipe=replace(RECIPE, epochs=1),
        one_network=True,
        rows=(
            row(OneShot(Method("magnitude")), label="m"),
            row(OneShot(Method("woodfisher", 64)), label="w"),
        ),
    )
    rows = list(Run(experiment, split(12), Setting(seeds=2)).rows())
    assert [(r["label"], r["seed"]) for r in rows] == [("dense", 0), ("m", 0), ("w", 0), ("w", 1)]


def test_below_one_epoch_a_part_of_the_examples_is_seen():
    [found] = run(row(Before(Method("random")), Untrained()), scale=1 / 24)
    assert found["training_flops"] == pytest.approx(100.0)
