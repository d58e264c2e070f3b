"""The networks, images and training of the BMRS benchmarks on MNIST (arXiv:2406.01345).

The paper's networks, 32×32 images, 80 % of the training images to train on, Adam with the paper's
learning rates for the weights and larger ones for the gates.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from tests.references.mlpnet import load_mnist
from torchprune_bayes.gates import attach_gates
from torchprune_bayes.training import GateTraining, gate_parameter_groups

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


def train_gated(
    model: nn.Module, images: Images, arguments: argparse.Namespace, **options: object
) -> GateTraining:
    """Attach gates and train with them; ``options`` say when and how they close."""
    attach_gates(model, noise=arguments.noise, preserve=True)
    training = GateTraining(
        model,
        data_size=len(images.train[0]),
        kl=arguments.kl,
        anneal_steps=round(arguments.anneal * len(images.train[0]) / BATCH),
        **options,  # type: ignore[arg-type]
    )
    rate = RATES[arguments.network]
    groups = gate_parameter_groups(model, rate, multiplier=arguments.multiplier)
    optimizer = torch.optim.Adam(groups, fused=True)
    for _ in range(arguments.epochs):
        epoch(model, images.train, optimizer, training)
        training.end_epoch()
    return training


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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the recipe."""
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--pretrain", type=int, default=6, help="epochs without gates")
    parser.add_argument("--epochs", type=int, default=3, help="epochs with gates")
    parser.add_argument("--multiplier", type=float, default=15.0, help="gates' learning rate")
    parser.add_argument("--kl", type=_scale, default="mean", help="elbo, mean, sum or a number")
    parser.add_argument("--anneal", type=float, default=0.0, help="epochs until all KL counts")
    parser.add_argument("--noise", default="example", help="example, batch or element")
    parser.add_argument("--device", default="cpu")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and shows defaults."""


def _resized(x: Tensor) -> Tensor:
    return interpolate(x.view(-1, 1, 28, 28), size=32, mode="bilinear", antialias=True)


def _scale(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
