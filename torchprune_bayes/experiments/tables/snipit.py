"""SNIP-it (Verdenius, Stol and Forré, 2020, arXiv:2006.00896)."""

from __future__ import annotations

from dataclasses import replace

from torchprune_bayes.experiments.description import (
    Experiment,
    Published,
    Recipe,
    Row,
    without_numbers,
)
from torchprune_bayes.experiments.networks import vgg16
from torchprune_bayes.experiments.published_networks import resnet18
from torchprune_bayes.experiments.regularised import (
    Decorated,
    L0Gates,
    Penalised,
    WeightsAndUnits,
)
from torchprune_bayes.experiments.starts import Trained, Untrained
from torchprune_bayes.experiments.units import Cut, CutDuring, Importance
from torchprune_bayes.experiments.weights import Before, During, Halving, Method, Rewinding

PAPER = "arXiv:2006.00896"

_RECIPE = Recipe(80, "adam", 2e-3, 512, weight_decay=5e-5, clip=10.0, flip=0.2)
_COURSE = Halving(delay=4, every=4)
_SAMPLES = 2560

_UNITS, _WEIGHTS = 0.93, 0.98
_STRUCTURED = (
    # README: a point of accuracy lost, an eighth of the FLOPs of all forward passes.
    Row(
        "SNAP-it, before training",
        *(Untrained(), Cut(Importance("snap-it"), stepwise=True)),
        {_UNITS: Published(drop=1.0, training_flops=12.5)},
    ),
    Row(
        "SNAP-it, while training",
        *(Untrained(), CutDuring(Importance("snap-it"), _COURSE), without_numbers(_UNITS)),
    ),
    Row(
        *("SNAP, before training", Untrained(), Cut(Importance("snap-it"))),
        without_numbers(_UNITS),
    ),
    Row(
        *("random units, before training", Untrained()),
        *(Cut(Importance("random"), by_layer=True), without_numbers(_UNITS)),
    ),
    Row(
        *("efficient ConvNets, after 70 epochs", Trained(epochs=70)),
        *(Cut(Importance("l1"), by_layer=True, tune=10), without_numbers(_UNITS)),
    ),
    Row("gate decorators, tick-tock", Trained(), Decorated(), without_numbers(_UNITS)),
    # These take a factor instead of a sparsity.
    Row("group Hoyer-square", Untrained(), Penalised(1e-3), without_numbers(None)),
    Row("L0 gates", Untrained(), L0Gates(), without_numbers(None)),
    # Weights and units jointly: SNIP-it's sparsity of weights.
    Row("CNIP-it, before training", Untrained(), WeightsAndUnits(), without_numbers(_WEIGHTS)),
    Row(
        *("CNIP, before training", Untrained(), WeightsAndUnits(stepwise=False)),
        without_numbers(_WEIGHTS),
    ),
    Row(
        *("IMP, rewound to epoch 6", Untrained(), Rewinding(remember=6, rounds=4)),
        without_numbers(_WEIGHTS),
    ),
)

_UNSTRUCTURED = (
    # README: no accuracy lost, and four points.
    Row(
        "SNIP-it, while training",
        *(Untrained(), During(Method("snip-it", _SAMPLES, options={"steps": 0}), _COURSE)),
        {_WEIGHTS: Published(drop=0.0)},
    ),
    Row(
        *("SNIP-it, before training", Untrained(), Before(Method("snip-it", _SAMPLES))),
        {_WEIGHTS: Published(drop=4.0)},
    ),
    Row(
        *("SNIP, before training", Untrained(), Before(Method("snip", _SAMPLES))),
        without_numbers(_WEIGHTS),
    ),
    Row(
        *("GraSP, before training", Untrained(), Before(Method("grasp", _SAMPLES))),
        without_numbers(_WEIGHTS),
    ),
    Row(
        *("random weights, before training", Untrained(), Before(Method("random"))),
        without_numbers(_WEIGHTS),
    ),
    Row(
        *("IMP, rewound to epoch 6", Untrained(), Rewinding(remember=6, rounds=4)),
        without_numbers(_WEIGHTS),
    ),
    Row("Hoyer-square", Untrained(), Penalised(1e-5, units=False), without_numbers(None)),
)

_DENSE = (
    "The paper gives points lost against its own dense runs, whose accuracies it draws. Its scores "
    "are those of another loss, the mean logit of the right class."
)

VGG16 = Experiment(
    title="SNIP-it, VGG-16 on CIFAR-10, units removed",
    paper=PAPER,
    data="cifar10",
    network=vgg16,
    recipe=_RECIPE,
    rows=_STRUCTURED,
    differs=f"{_DENSE} Its VGG-16 has three more linear layers, 50.7 M parameters in all.",
)

RESNET18 = Experiment(
    title="SNIP-it, ResNet-18 on CIFAR-10, weights pruned",
    paper=PAPER,
    data="cifar10",
    network=resnet18,
    recipe=_RECIPE,
    rows=_UNSTRUCTURED,
    differs=f"{_DENSE} Its ResNet-18 has the stem for large images, as here.",
)

_FIGURES_ALONE = "The paper draws these results and prints no numbers."


def _on_imagenette(experiment: Experiment) -> Experiment:
    rows = (replace(row, published=without_numbers(*row.published)) for row in experiment.rows)
    return replace(
        experiment,
        title=experiment.title.replace("CIFAR-10", "Imagenette"),
        data="image folders",
        size=128,
        rows=tuple(rows),
        differs=_FIGURES_ALONE,
    )


EXPERIMENTS = {
    "snipit-vgg16": VGG16,
    "snipit-resnet18": RESNET18,
    "snipit-vgg16-imagenette": _on_imagenette(VGG16),
    "snipit-resnet18-imagenette": _on_imagenette(RESNET18),
}
