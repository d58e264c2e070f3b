"""LeNet on MNIST: SpaM and OPD beside models trained as usual and other criteria.

    python -m tests.benchmarks.lenet_spam --data ../shared/data
    python -m tests.benchmarks.lenet_spam --train-images 20000 --epochs 40 --tune-images 5000

Trained with SGD, momentum 0.9 and a cosine from learning rate 0.1, batches of 128; the prior is
updated every five epochs from a random subset of the data. ``map`` is the same training with the
prior precision held at one. Pruned copies are measured at once and after fine-tuning with masks at
a tenth of the learning rate, on ``--tune-images`` other random images in every epoch; structured
ones are shrunk for good. Accuracy and expected
calibration error in percent, NLL in nats; mean and sample standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.references.mlpnet import load_mnist
from torchprune_bayes import Calibration, bake, detach_views, keep_sparse, masks_of, prune_global
from torchprune_bayes.costs import flops_per_weight
from torchprune_bayes.curvature import trainable_parameters
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.methods import find_method
from torchprune_bayes.reports import ResultsTable, evaluate
from torchprune_bayes.structured import shrink
from torchprune_bayes.structured.importances.opd import OPDImportance
from torchprune_bayes.training import SpaM

Data = tuple[Tensor, Tensor]
PRIORS = ["map", "unitwise", "diag"]
CRITERIA = ["opd", "magnitude", "snip", "grasp", "random"]
_BATCH = 128


def main() -> None:
    """Print the table and write it as JSON, after every model."""
    arguments = _parser().parse_args()
    train_x, train_y, test_x, test_y = load_mnist(arguments.data)
    images = arguments.train_images or len(train_x)
    train = train_x[:images].reshape(-1, 1, 28, 28), train_y[:images]
    test = test_x.reshape(-1, 1, 28, 28), test_y
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = ((x.to(device), y.to(device)) for x, y in (train, test))
    table = ResultsTable()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for prior in arguments.priors:
            add_model(table, prior, seed, train, test, arguments)
            table.to_json(arguments.output)
    keys = ["prior", "criterion", "sparsity", "stage"]
    values = ["accuracy", "nll", "ece", "parameters", "flops"]
    print(table.summarise(keys, values).to_text())


def add_model(
    table: ResultsTable, prior: str, seed: int, train: Data, test: Data, arguments: Any
) -> None:
    """Train one model and add a row for each way of pruning it."""
    torch.manual_seed(seed)
    # On a CPU the fastest layout for so few channels.
    model = lenet().to(memory_format=torch.channels_last).to(train[0].device)
    start = time.process_time()
    posterior = train_model(model, prior, train, arguments)
    row: dict[str, Any] = {
        "prior": prior,
        "seed": seed,
        "log_evidence": posterior.log_marginal_likelihood(),
        "seconds": time.process_time() - start,
    }
    found = measured(model, test)
    table.add(**row, criterion="none", sparsity=0.0, stage="dense", **found)
    print(
        f"{prior:9} seed {seed}: {found['accuracy']:.2f} dense, {row['seconds']:.0f} s", flush=True
    )
    for criterion in arguments.criteria:
        for sparsity in arguments.sparsities:
            pruned = prune_weights(model, posterior, criterion, sparsity, train, seed)
            _add_stages(table, row, pruned, criterion, sparsity, train, test, arguments)
    for sparsity in arguments.structured:
        small = copy.deepcopy(model)
        importance = OPDImportance(posterior)
        shrink(small, train[0][:2], importance, sparsity=sparsity, target="channels")
        _add_stages(table, row, small, "opd-units", sparsity, train, test, arguments)


def _add_stages(
    table: ResultsTable,
    row: dict[str, Any],
    model: nn.Module,
    criterion: str,
    sparsity: float,
    train: Data,
    test: Data,
    arguments: Any,
) -> None:
    kind: dict[str, Any] = {"criterion": criterion, "sparsity": sparsity}
    found = measured(model, test)
    table.add(**row, **kind, stage="one-shot", **found)
    report = f"{row['prior']:9} {criterion:9} {sparsity:.2f}: {found['accuracy']:.2f}"
    if arguments.tune:
        fine_tune(model, train, arguments)
        found = measured(model, test)
        table.add(**row, **kind, stage="tuned", **found)
        report += f", tuned {found['accuracy']:.2f}"
    print(report, flush=True)


def lenet() -> nn.Sequential:
    """LeNet with 6, 16 and 120 channels and a hidden layer of 84."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(6, 16, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 120, 5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def train_model(model: nn.Module, prior: str, train: Data, arguments: Any) -> Posterior:
    """Train with that prior structure on weights and biases; returns the posterior."""
    optimizer = _optimizer(model, arguments.optimizer, 1.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs, eta_min=1e-6)
    spam = SpaM(
        optimizer,
        Calibration(
            model,
            Shuffled(train, 512),
            cross_entropy,
            params=trainable_parameters(model),
            num_samples=min(arguments.samples, len(train[1])),
        ),
        "layerwise" if prior == "map" else prior,
        burn_in=arguments.burn_in,
        every=arguments.every,
        structure=arguments.structure,
        kind=arguments.kind,
        num_data=len(train[1]),
        enabled=prior != "map",
    )
    for _ in range(arguments.epochs):
        _epoch(model, optimizer, train)
        rate.step()
        spam.step()
    posterior = spam.posterior()
    spam.remove()
    return posterior


def prune_weights(
    model: nn.Module,
    posterior: Posterior,
    criterion: str,
    sparsity: float,
    train: Data,
    seed: int,
) -> nn.Module:
    """A pruned copy: one threshold over all weights of layers."""
    pruned = copy.deepcopy(model)
    calibration = Calibration(
        pruned, Shuffled(train, 512), cross_entropy, num_samples=1000, seed=seed
    )
    options: dict[str, Any] = {"amount": sparsity}
    if criterion == "opd":
        options["posterior"] = posterior
    if find_method(criterion).needs_calibration:
        options["calibration"] = calibration
    prune_global(calibration.pairs(), criterion, **options)
    return pruned


def fine_tune(model: nn.Module, train: Data, arguments: Any) -> None:
    """Train what is left at a tenth of the learning rate; pruned weights stay zero."""
    masks = masks_of(model)
    bake(model)
    optimizer = _optimizer(model, arguments.optimizer, 0.1)
    if masks:
        keep_sparse(optimizer, {model.get_parameter(n): mask for n, mask in masks.items()})
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.tune)
    for _ in range(arguments.tune):
        _epoch(model, optimizer, train, arguments.tune_images)
        rate.step()


def measured(model: nn.Module, test: Data) -> dict[str, float]:
    """Test metrics, and what the model still needs: parameters and FLOPs that are not zero."""
    batches = zip(test[0].split(1000), test[1].split(1000), strict=True)
    found = asdict(evaluate(model, batches))
    dense = bake(copy.deepcopy(detach_views(model)))
    sample = [(test[0][:1], test[1][:1])]
    costs = flops_per_weight(Calibration(dense, sample, cross_entropy))
    weights = dict(dense.named_parameters())
    return {
        "accuracy": 100 * found["accuracy"],
        "nll": found["nll"],
        "ece": 100 * found["ece"],
        "brier": found["brier"],
        "parameters": sum(int((weight != 0).sum()) for weight in weights.values()),
        "flops": sum(cost * int((weights[name] != 0).sum()) for name, cost in costs.items()),
    }


class Shuffled(Iterable[Data]):
    """Batches in an order that torch's random state decides, indexed at once."""

    def __init__(self, data: Data, size: int) -> None:
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[Data]:
        """Go through the data once."""
        x, y = self.data
        for chosen in torch.randperm(len(y)).to(y.device).split(self.size):
            yield x[chosen], y[chosen]


def _optimizer(model: nn.Module, name: str, share: float) -> torch.optim.Optimizer:
    """The optimizer at a share of its learning rate."""
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=share * 2e-3)
    return torch.optim.SGD(model.parameters(), lr=share * 0.1, momentum=0.9)


def _epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, train: Data, images: int = 0
) -> None:
    steps = -(-images // _BATCH) or None
    for x, y in islice(Shuffled(train, _BATCH), steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of data")
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=PRIORS)
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=CRITERIA[:4])
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--structured", nargs="*", type=float, default=[0.4, 0.7, 0.9])
    parser.add_argument("--structure", choices=["diagonal", "kronecker"], default="diagonal")
    parser.add_argument(
        "--kind", choices=["ggn", "monte_carlo", "empirical"], default="monte_carlo"
    )
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
    parser.add_argument("--samples", type=int, default=10_000, help="images of a curvature")
    parser.add_argument("--train-images", type=int, default=0, help="the first so many; 0 for all")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--burn-in", type=int, default=10)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--tune", type=int, default=10, help="epochs of fine-tuning; 0 for none")
    parser.add_argument(
        "--tune-images", type=int, default=0, help="images of such an epoch; 0 for all"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/lenet_spam.json"))
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and shows defaults."""


if __name__ == "__main__":
    main()
