"""BMRS and its baselines on MNIST: accuracy against what real shrinking leaves.

The recipe is that of Wright, Igel and Selvan (2024, arXiv:2406.01345), tables 1 and C: an MLP of
eight layers of 100 units (7×100 and the input layer) and LeNet-5, 32×32 images, 80 % of the
training images to train on, Adam with the paper's learning rates, pruning after every epoch. There
are fewer epochs: some without gates, which all rows of a seed share and which stand for those of
the paper in which gates are still narrow, then some with gates whose learning rate is larger. Then
closed units are cut out, and the small network is fine-tuned without gates; the paper fine-tunes
with them. What is counted are the parameters of the networks that are left. The paper counts zeros,
those of the gates included.

    python -m tests.benchmarks.bmrs_mnist --networks mlp --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from tests.references.mlpnet import load_mnist
from torchprune_bayes.gates import (
    BMRSNormal,
    BMRSUniform,
    Criterion,
    attach_gates,
    find_criterion,
    fold_gates,
    gates_of,
)
from torchprune_bayes.reports import ResultsTable
from torchprune_bayes.structured import shrink
from torchprune_bayes.structured.importances.bmrs import BMRSImportance
from torchprune_bayes.training import GateTraining, gate_parameter_groups

CRITERIA: dict[str, Criterion] = {
    "BMRS_N": BMRSNormal(),
    "BMRS_U-8": BMRSUniform(8),
    "BMRS_U-4": BMRSUniform(4),
    "BMRS_U-8 hole": BMRSUniform(8, p2=23, tau=0),
    "BMRS_U-4 hole": BMRSUniform(4, p2=23, tau=0),
    "BMRS_N tau=0": BMRSNormal(tau=0),
    "SNR": find_criterion("snr"),
    "E[theta]": find_criterion("mean"),
}
# Compared at the share of closed gates that BMRS_N came to, as in the paper.
MATCHED = {"L2": find_criterion("l2")}
# Compression and accuracy of the paper's table 1, 10 seeds, 50 epochs.
PAPER = {
    "mlp": {
        "dense": (0, 97.43),
        "L2": (43.11, 10.39),
        "E[theta]": (52.08, 96.88),
        "SNR": (58.57, 96.92),
        "BMRS_N": (48.86, 96.95),
        "BMRS_U-8": (48.73, 96.93),
        "BMRS_U-4": (54.47, 96.99),
    },
    "lenet5": {
        "dense": (0, 99.07),
        "L2": (83.42, 11.35),
        "E[theta]": (88.29, 51.30),
        "SNR": (92.66, 62.70),
        "BMRS_N": (86.90, 95.59),
        "BMRS_U-8": (86.11, 95.27),
        "BMRS_U-4": (87.58, 96.66),
    },
}
BATCH = 128
RATES = {"mlp": 8.5e-4, "lenet5": 1.4e-3}


@dataclass(frozen=True)
class Images:
    """MNIST as the networks see it, ``[n, 1, 32, 32]``."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @staticmethod
    def load(folder: Path, device: str) -> Images:
        """Read, resize and split."""
        train_x, train_y, test_x, test_y = load_mnist(folder)
        large, test = (_resized(x) for x in (train_x, test_x))
        order = torch.randperm(len(large), generator=torch.Generator().manual_seed(0))
        parts = [(large[i], train_y[i]) for i in order.split([48_000, 12_000])]
        train, validation, held_out = (
            (x.to(device), y.to(device)) for x, y in (*parts, (test, test_y))
        )
        return Images(train, validation, held_out)


def build(network: str) -> nn.Sequential:
    """The paper's networks; 174 210 and 61 706 parameters."""
    if network == "mlp":
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(1024, 100), nn.Tanh()]
        for _ in range(7):
            layers += [nn.Linear(100, 100), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(100, 10))
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of right answers, in percent."""
    model.eval()
    right = [model(x).argmax(1) == y for x, y in zip(*(d.split(2000) for d in data), strict=True)]
    return 100.0 * float(torch.cat(right).double().mean())


def train(
    model: nn.Module,
    images: Images,
    arguments: argparse.Namespace,
    criterion: Criterion | None,
    amount: float | None = None,
) -> tuple[nn.Module, float]:
    """Train with gates and prune after every epoch; shrink, fine-tune, and take the best epoch.

    Without a criterion the network has no gates; then it is trained afresh, as long as the others
    in all. With an amount it is pruned once, by that much. Returns the percentage of closed gates
    along with the network.
    """
    rate = RATES[arguments.network]
    if criterion is None:
        total = arguments.pretrain + arguments.epochs + arguments.finetune
        return train_dense(model, images, rate, total), 0.0
    attach_gates(model, noise=arguments.noise, preserve=True)
    training = GateTraining(
        model,
        data_size=len(images.train[0]),
        kl=arguments.kl,
        anneal_steps=round(arguments.anneal * len(images.train[0]) / BATCH),
        criterion=criterion,
        prune_every=1 if amount is None else None,
        amount=amount,
        beyond=amount is not None,
    )
    groups = gate_parameter_groups(model, rate, multiplier=arguments.multiplier)
    optimizer = torch.optim.Adam(groups, fused=True)
    for _ in range(arguments.epochs):
        epoch(model, images.train, optimizer, training)
        training.end_epoch()
    training.begin_finetuning()
    closed = 100.0 * training.gates.closed / training.gates.units
    model = shrunk(model, images.test[0][:4])
    return train_dense(model, images, rate, arguments.finetune), closed


def train_dense(model: nn.Module, images: Images, rate: float, epochs: int) -> nn.Module:
    """Train without gates; the best epoch on the validation images."""
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    best = (0.0, model)
    for _ in range(epochs):
        epoch(model, images.train, optimizer, None)
        found = accuracy(model, images.validation)
        if found > best[0]:
            best = (found, copy.deepcopy(model))
    return best[1]


def epoch(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    training: GateTraining | None,
) -> None:
    """One pass over the training images in batches of 128."""
    model.train()
    x, y = data
    for index in torch.randperm(len(x), device=x.device).split(BATCH):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[index]), y[index])
        if training is not None:
            loss = loss + training.penalty()
        loss.backward()
        optimizer.step()
        if training is not None:
            training.step()


def shrunk(model: nn.Module, example: Tensor) -> nn.Module:
    """Fold the gates and cut out what is closed, and nothing else."""
    model.eval()
    importance = BMRSImportance(gates_of(model), criterion=None)
    fold_gates(model)
    shrink(model, example, importance, target="evidence")  # compares with the masked model
    return model


def main() -> None:
    """Print the table and write it as JSON."""
    arguments = _parser().parse_args()
    arguments.criteria = arguments.criteria or [*CRITERIA, *MATCHED]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    images = Images.load(arguments.data, arguments.device)
    table = ResultsTable()
    for network in arguments.networks:
        arguments.network = network
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            closed = None
            torch.manual_seed(seed)
            start_from = build(network).to(arguments.device)
            train_dense(start_from, images, RATES[network], arguments.pretrain)
            for name in ("dense", *arguments.criteria):
                start = time.perf_counter()
                found = row(name, seed, images, arguments, closed, start_from)
                closed = found["gates_closed"] if name == "BMRS_N" else closed
                table.add(**found, seconds=time.perf_counter() - start)
                print(list(table)[-1], flush=True)
                table.to_json(arguments.output)
    print(beside_the_paper(table).to_text())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of data")
    parser.add_argument("--networks", nargs="+", choices=list(PAPER), default=list(PAPER))
    parser.add_argument("--criteria", nargs="+", choices=[*CRITERIA, *MATCHED])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--pretrain", type=int, default=6, help="epochs without gates")
    parser.add_argument("--epochs", type=int, default=3, help="epochs with gates that may close")
    parser.add_argument("--finetune", type=int, default=10, help="epochs of the shrunk network")
    parser.add_argument("--multiplier", type=float, default=15.0, help="gates' learning rate")
    parser.add_argument("--kl", type=_scale, default="mean", help="elbo, mean, sum or a number")
    parser.add_argument("--anneal", type=float, default=0.0, help="epochs until all KL counts")
    parser.add_argument("--noise", default="example", help="example, batch or element")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/bmrs_mnist.json"))
    return parser


def beside_the_paper(table: ResultsTable) -> ResultsTable:
    """Means over the seeds with the paper's rows."""
    columns = ["compression", "gates_closed", "accuracy"]
    found = ResultsTable()
    for row in table.summarise(["network", "criterion"], columns):
        published = PAPER[str(row["network"])].get(str(row["criterion"]))
        names = ("paper_compression", "paper_accuracy")
        found.add(**row, **dict(zip(names, map(float, published or ()), strict=False)))
    return found


def row(
    name: str,
    seed: int,
    images: Images,
    arguments: argparse.Namespace,
    matched: float | None,
    start_from: nn.Module,
) -> dict[str, Any]:
    """Train, shrink and measure one network; ``matched`` is the share of gates L2 closes."""
    torch.manual_seed(seed)
    model: nn.Module = build(arguments.network).to(arguments.device)
    if name != "dense":
        model = copy.deepcopy(start_from)
    total = sum(parameter.numel() for parameter in model.parameters())
    if name in MATCHED:
        if matched is None:
            raise ValueError(f"Expected BMRS_N before {name}, whose share of gates it closes.")
        model, closed = train(model, images, arguments, MATCHED[name], matched / 100.0)
    else:
        model, closed = train(model, images, arguments, CRITERIA.get(name))
    left = sum(parameter.numel() for parameter in model.parameters())
    return {
        "network": arguments.network,
        "criterion": name,
        "kl": arguments.kl,
        "seed": seed,
        "compression": 100.0 * (1 - left / total),
        "gates_closed": closed,
        "accuracy": accuracy(model, images.test),
    }


def _resized(x: Tensor) -> Tensor:
    return interpolate(x.view(-1, 1, 28, 28), size=32, mode="bilinear", antialias=True)


def _scale(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and shows defaults."""


if __name__ == "__main__":
    main()
