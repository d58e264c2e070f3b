"""WoodFisher (Singh and Alistarh, 2020, arXiv:2004.14340)."""

from __future__ import annotations

from dataclasses import replace

from torchprune_bayes.experiments.description import (
    Decay,
    Experiment,
    Published,
    Recipe,
    Row,
    accuracies,
    without_numbers,
)
from torchprune_bayes.experiments.networks import mlpnet, resnet20
from torchprune_bayes.experiments.published_networks import mobilenet_v1, resnet50
from torchprune_bayes.experiments.starts import Trained
from torchprune_bayes.experiments.weights import During, Method, OneShot, Polynomial

PAPER = "arXiv:2004.14340"

MLPNET_RECIPE = Recipe(25, "sgd", 0.02, 64, "cosine", momentum=0.9)
MAGNITUDE = OneShot(Method("magnitude"))
_BLOCKS = {"damping": 1e-5, "update": "single", "update_scale": 1.0}
_WHOLE_LAYERS = {"block_size": "tensor", **_BLOCKS}

MLPNET = Experiment(
    title="WoodFisher, MLPNet on MNIST, pruned at once",
    paper=PAPER,
    data="mnist",
    network=mlpnet,
    recipe=MLPNET_RECIPE,
    one_network=True,
    dense=Published(93.97),
    rows=(
        # The magnitude column is that of CBS's table for the same checkpoint.
        Row("magnitude", Trained(), MAGNITUDE, accuracies({0.9: 90.30, 0.95: 83.64, 0.98: 32.25})),
        # tests/mnist_test_results.csv of the authors at 0.95; a third party's runs of their code.
        Row(
            "woodfisher",
            Trained(),
            OneShot(Method("woodfisher", 100, options=_WHOLE_LAYERS)),
            accuracies({0.8: 93.20, 0.9: 90.88, 0.95: 84.18}),
        ),
        Row(
            "kfac",
            Trained(),
            OneShot(Method("kfac", 100, options={"damping": 1e-5, "pi": False})),
            accuracies({0.95: 81.26}),
        ),
        Row(
            "diagonal-fisher, per layer",
            Trained(),
            OneShot(Method("diagonal-fisher", 4096, options={"scope": "layer"})),
            accuracies({0.95: 19.88}),
        ),
    ),
    differs=(
        "The original's diagonal Fisher ranks within each layer whatever is asked; over all "
        "layers, the default here, it does much better."
    ),
)

# The convolutions of the three stages, 267 264 weights, as in the authors' sweep.
RESNET20_LEFT_WHOLE = ("conv1", "fc", "layer2.0.downsample", "layer3.0.downsample")
CIFAR_RECIPE = Recipe(
    180, "sgd", 0.1, 128, "cosine", momentum=0.9, weight_decay=5e-4, flip=0.5, crop=4
)
ONE_SHOT_SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

RESNET20 = Experiment(
    title="WoodFisher, ResNet-20 on CIFAR-10, pruned at once",
    paper=PAPER,
    data="cifar10",
    network=resnet20,
    recipe=CIFAR_RECIPE,
    exclude=RESNET20_LEFT_WHOLE,
    one_network=True,
    rows=(
        Row("magnitude", Trained(), MAGNITUDE, without_numbers(*ONE_SHOT_SPARSITIES)),
        # The two sizes of mini-batches of the authors' sweep, 1 and 50.
        Row(
            "woodfisher",
            Trained(),
            OneShot(Method("woodfisher", 1000, options=_WHOLE_LAYERS)),
            without_numbers(*ONE_SHOT_SPARSITIES),
        ),
        Row(
            "woodfisher, mini-batches of 50",
            Trained(),
            OneShot(Method("woodfisher", 50_000, 50, _WHOLE_LAYERS)),
            without_numbers(*ONE_SHOT_SPARSITIES),
        ),
    ),
    differs=(
        "The paper draws these results and prints no table. The original takes each layer as one "
        "block, and so is it done here."
    ),
)


def _gradual(label: str, course: Polynomial, method: Method, numbers: dict[float, float]) -> Row:
    # Best accuracies of 100 epochs, plotmaker/*.py of the authors.
    pruning = During(method, course, decay_after=False)
    return Row(label, Trained(), pruning, accuracies(numbers))


def _woodfisher(samples: int, mini_batch: int, block: int, recompute: int) -> Method:
    """``--recompute-num`` R takes new gradients R times within a step."""
    options = {"block_size": block, **_BLOCKS, "steps": recompute + 1, "path": "cubic"}
    return Method("woodfisher", samples * mini_batch, mini_batch, options)


_RESNET50_COURSE = Polynomial(begin=1, end=40, every=5, initial=0.05)
_MOBILENET_COURSE = Polynomial(begin=4, end=24, every=4, initial=0.05)

RESNET50 = Experiment(
    title="WoodFisher, ResNet-50 on ImageNet, pruned gradually in 100 epochs",
    paper=PAPER,
    data="image folders",
    network=resnet50,
    recipe=Recipe(
        *(100, "sgd", 0.005, 256, Decay(40, 90, 6, 0.6)), momentum=0.9, weight_decay=1e-4, flip=0.5
    ),
    dense=Published(77.01),
    rows=(
        _gradual(
            *("magnitude", _RESNET50_COURSE, Method("magnitude")),
            {0.8: 76.596, 0.9: 75.094, 0.95: 71.65, 0.98: 64.166},
        ),
        _gradual(
            *("woodfisher", _RESNET50_COURSE, _woodfisher(400, 400, 2000, recompute=0)),
            {0.8: 76.732, 0.9: 75.26, 0.95: 72.158, 0.98: 65.466},
        ),
    ),
    differs=(
        "The original's schedule ends before its last step, at 79.92, 89.91, 94.90 and 97.90 %; "
        "here what is asked for is reached. Blocks hold 2000 weights, the original's 1000 at 98 %."
    ),
)

MOBILENET = replace(
    RESNET50,
    title="WoodFisher, MobileNetV1 on ImageNet, pruned gradually in 100 epochs",
    network=mobilenet_v1,
    recipe=Recipe(
        *(100, "sgd", 0.005, 256, Decay(30, 100, 1, 0.92)),
        momentum=0.9,
        weight_decay=1e-4,
        flip=0.5,
    ),
    dense=Published(72.0),
    rows=(
        _gradual(
            *("magnitude", _MOBILENET_COURSE, Method("magnitude")), {0.7528: 69.896, 0.89: 63.006}
        ),
        _gradual(
            *("woodfisher", _MOBILENET_COURSE, _woodfisher(400, 2400, 10_000, recompute=0)),
            {0.7528: 70.088, 0.89: 63.866},
        ),
    ),
    differs="",
)

EXPERIMENTS = {
    "woodfisher-mlpnet": MLPNET,
    "woodfisher-resnet20": RESNET20,
    "woodfisher-resnet50": RESNET50,
    "woodfisher-mobilenet": MOBILENET,
}
