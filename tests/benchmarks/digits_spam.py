"""SpaM on scikit-learn's digits: what each prior structure leaves of the accuracy after pruning.

    python -m tests.benchmarks.digits_spam
    python -m tests.benchmarks.digits_spam --priors diag --structure kronecker --seeds 1

A multilayer perceptron 64-128-128-10, 1200 images to train on and 597 to test, 120 epochs of Adam,
one-shot pruning of the weights without fine-tuning. Accuracy in percent, mean and sample standard
deviation over seeds that split, initialise and shuffle; the log marginal likelihood is that of the
final posterior. ``map`` is the same training with the prior precision held at one.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration, prune_global
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.methods import OPD
from torchprune_bayes.reports import ResultsTable
from torchprune_bayes.training import SpaM

PRIORS = ["map", "scalar", "layerwise", "unitwise", "diag"]
_BATCH, _TRAIN = 64, 1200


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=PRIORS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--structure", choices=["diagonal", "kronecker"], default="diagonal")
    parser.add_argument("--kind", choices=["ggn", "monte_carlo", "empirical"], default="ggn")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--burn-in", type=int, default=20)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/digits_spam.json"))
    arguments = parser.parse_args()
    table = ResultsTable()
    for prior in arguments.priors:
        for seed in range(arguments.seeds):
            add_run(table, prior, seed, arguments)
    keys = ["prior", "scores", "sparsity"]
    print(table.summarise(keys, ["accuracy", "log_evidence", "seconds"]).to_text())
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_json(arguments.output)


def add_run(table: ResultsTable, prior: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train once and prune copies to every sparsity, by posterior damage and by magnitude."""
    start = time.process_time()
    train, test = split(seed)
    model, posterior = trained(train, prior, arguments)
    seconds = time.process_time() - start
    evidence = posterior.log_marginal_likelihood()
    for scores in ("opd", "magnitude"):
        for sparsity in [0.0, *arguments.sparsities]:
            found = accuracy(pruned(model, posterior, scores, sparsity), *test)
            table.add(
                prior=prior,
                scores=scores,
                sparsity=sparsity,
                seed=seed,
                accuracy=found,
                log_evidence=evidence,
                seconds=seconds,
            )
    print(f"{prior:10} seed {seed}: log evidence {evidence:.0f}, {seconds:.1f} s", flush=True)


def split(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Train and test images in [0, 1] with labels, and the random state for all that follows."""
    images, labels = load_digits(return_X_y=True)
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels)[order]
    return (x[:_TRAIN], y[:_TRAIN]), (x[_TRAIN:], y[_TRAIN:])


def trained(
    train: tuple[Tensor, Tensor], prior: str, arguments: argparse.Namespace
) -> tuple[nn.Sequential, Posterior]:
    """A model trained with that prior structure, and its posterior."""
    layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = list(zip(train[0].split(256), train[1].split(256), strict=True))
    spam = SpaM(
        optimizer,
        Calibration(model, batches, cross_entropy, num_samples="all"),
        "layerwise" if prior == "map" else prior,
        burn_in=arguments.burn_in,
        every=arguments.every,
        structure=arguments.structure,
        kind=arguments.kind,
        enabled=prior != "map",
    )
    for _ in range(arguments.epochs):
        for chosen in torch.randperm(_TRAIN).split(_BATCH):
            optimizer.zero_grad()
            cross_entropy(model(train[0][chosen]), train[1][chosen]).backward()
            optimizer.step()
        spam.step()
    return model, spam.posterior()


def pruned(
    model: nn.Sequential, posterior: Posterior, scores: str, sparsity: float
) -> nn.Sequential:
    """A pruned copy."""
    found = copy.deepcopy(model)
    if scores == "opd":
        prune_global(None, OPD, amount=sparsity, posterior=posterior, model=found)
    else:
        weights: list[tuple[nn.Module, str]] = [
            (layer, "weight") for layer in found if isinstance(layer, nn.Linear)
        ]
        prune_global(weights, "magnitude", amount=sparsity)
    return found


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, in percent."""
    return 100.0 * float((model(x).argmax(-1) == y).double().mean())


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and shows defaults."""


if __name__ == "__main__":
    main()
