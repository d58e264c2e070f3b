"""SNIP-it's structured baselines side by side on scikit-learn's digits, each cut for real.

    python -m tests.benchmarks.structured_baselines --seeds 3

A small VGG with batch norms on 8 x 8 images, trained for 30 epochs; four fifths of the units go, of
CNIP-it and IMP 95 % of the weights, or what a penalty or the evidence removes by itself. The
strengths of the penalties were chosen with ``--tuning``, which holds out a fifth of the training
images and leaves the test images alone.

Prints, over the seeds: test accuracy in percent, parameters that are gone or zero, FLOPs of a
forward pass and of all forward passes of the training, in percent of the dense network's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from torchprune_bayes.cli.digits import load_digits
from torchprune_bayes.experiments.description import (
    Experiment,
    Pruning,
    Recipe,
    Row,
    Start,
    Target,
    without_numbers,
)
from torchprune_bayes.experiments.engine import Run, as_table
from torchprune_bayes.experiments.examples import Examples, Split
from torchprune_bayes.experiments.gated import Gated, Gates
from torchprune_bayes.experiments.regularised import (
    Decorated,
    L0Gates,
    Penalised,
    WeightsAndUnits,
)
from torchprune_bayes.experiments.starts import Trained, Untrained
from torchprune_bayes.experiments.trial import Setting
from torchprune_bayes.experiments.units import Cut, CutDuring, Importance
from torchprune_bayes.experiments.weights import Halving, Rewinding

EPOCHS, UNITS, WEIGHTS = 30, 0.8, 0.95
RECIPE = Recipe(EPOCHS, "sgd", 0.05, 64, "cosine", momentum=0.9, weight_decay=5e-4)
SAMPLES = 512


def network(shape: tuple[int, ...], classes: int, width: float) -> nn.Module:
    """Four convolutions with batch norms."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for out in (16, 32, 0, 64, 64):
        if not out:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def rows(hoyer: float, l0: float, gates: float) -> tuple[Row, ...]:
    """What is compared."""
    snap = Importance("snap-it", SAMPLES)
    found: dict[str, tuple[Start, Pruning, Target]] = {
        "random units, before": (Untrained(), Cut(Importance("random"), by_layer=True), UNITS),
        "SNAP, before": (Untrained(), Cut(snap), UNITS),
        "SNAP-it, before": (Untrained(), Cut(snap, stepwise=True), UNITS),
        "SNAP-it, during": (Untrained(), CutDuring(snap, Halving(2, 2)), UNITS),
        "efficient ConvNets": (
            Trained(epochs=20),
            Cut(Importance("l1"), by_layer=True, tune=10, rate=0.5),
            UNITS,
        ),
        "gate decorators, tick-tock": (
            Trained(epochs=15),
            Decorated(tick=3, tock=2, increment=0.1, tune=10),
            UNITS,
        ),
        "group Hoyer-square": (Untrained(), Penalised(hoyer, before=20, tune=10), None),
        "L0 gates": (Untrained(), L0Gates(l0), None),
        "BMRS_N": (Untrained(), Gated("bmrs-n", gates=Gates(multiplier=gates)), None),
        "CNIP-it, before": (Untrained(), WeightsAndUnits(SAMPLES), WEIGHTS),
        "IMP (weights)": (Untrained(), Rewinding(remember=2, rounds=3), WEIGHTS),
    }
    return tuple(
        Row(label, start, pruning, without_numbers(target))
        for label, (start, pruning, target) in found.items()
    )


def split() -> Split:
    """The digits as tensors."""
    digits = load_digits()
    train, test = (Examples(part.inputs, part.labels) for part in (digits.train, digits.test))
    return Split(train, test, classes=10)


def main() -> None:
    """Print and write a row at a time, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hoyer", type=float, default=0.1, help="strength of the Hoyer penalty")
    parser.add_argument("--l0", type=float, default=0.1, help="strength of the L0 penalty")
    parser.add_argument(
        "--gates", type=float, default=20.0, help="learning rate of the gates, in that of weights"
    )
    parser.add_argument("--only", nargs="+", help="labels of rows")
    parser.add_argument("--tuning", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/structured_baselines.json"))
    given = parser.parse_args()
    chosen = [
        row
        for row in rows(given.hoyer, given.l0, given.gates)
        if row.label in (given.only or row.label)
    ]
    experiment = Experiment("digits", "", "digits", RECIPE, tuple(chosen), network)
    data = split().held_out() if given.tuning else split()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for row in Run(experiment, data, Setting(seeds=given.seeds)).rows():
        found.append({"flops": 100.0, "training_flops": 100.0, "compression": 0.0, **row})
        print(row, flush=True)
        as_table(found).to_json(given.output)
    values = ["ours", "compression", "flops", "training_flops"]
    print(as_table(found).summarise(["label"], values).to_markdown())


if __name__ == "__main__":
    main()
