"""SNIP-it and SNAP-it on the JPEG copies of CIFAR-10, before and during training.

    python -m tests.benchmarks.snipit_cifar --data ../shared/data --models resnet18 vgg16

ResNet-18 and VGG-16 with batch norm for 32 x 32 images, at a fraction of their published width.
Weights go to ``--weights`` and units to ``--units``, along the path of the paper, each step scored
on 2560 samples. ``during`` shrinks at the ends of epochs, one step of the path at a time, and the
optimizer goes on with what is left. Batch norms that have seen no data do nothing while weights
are scored, as in the published code; the last rows let them normalise each batch. SGD with
momentum, one-cycle learning rate, flips.

Prints, over the seeds: test accuracy in percent, parameters that are not zero, FLOPs of the whole
training (three forward passes for a step, two operations for a multiply-add, scoring counted with
the dense model) in units of the dense run's, and the same if zeros were skipped by some kernel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from tests.references.resnet20 import Block, load_cifar10
from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes.costs import flop_counter, flops_per_weight
from torchprune_bayes.methods import SNIPit
from torchprune_bayes.reports import ResultsTable
from torchprune_bayes.schedules import amount_between
from torchprune_bayes.structured import (
    RandomImportance,
    SNAPitImportance,
    find_groups,
    halving_path,
    shrink,
)

VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
SAMPLES = 2560

Data = tuple[Tensor, Tensor]
"""Images ``[n, 3, 32, 32]`` and labels ``[n]``."""


def vgg16(width: float) -> nn.Module:
    """Thirteen convolutions with batch norms, and a linear layer; zeros are max pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for full in VGG:
        if not full:
            layers.append(nn.MaxPool2d(2))
            continue
        out = max(round(full * width), 1)
        layers += [nn.Conv2d(channels, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


def resnet18(width: float) -> nn.Module:
    """A stem and four stages of two blocks each."""
    sizes = [max(round(full * width), 1) for full in (64, 128, 256, 512)]
    stem = nn.Conv2d(3, sizes[0], 3, 1, 1, bias=False)
    blocks = [Block(sizes[0], sizes[0], 1), Block(sizes[0], sizes[0], 1)]
    for before, after in pairwise(sizes):
        blocks += [Block(before, after, 2), Block(after, after, 1)]
    pool = nn.AdaptiveAvgPool2d(1)
    head = nn.Linear(sizes[-1], 10)
    return nn.Sequential(
        stem, nn.BatchNorm2d(sizes[0]), nn.ReLU(), *blocks, pool, nn.Flatten(), head
    )


MODELS = {"resnet18": resnet18, "vgg16": vgg16}


@dataclass
class Ledger:
    """What a training costs, in FLOPs."""

    executed: float = 0.0
    if_skipped: float = 0.0

    def add(self, model: nn.Module, image: Tensor, samples: int) -> None:
        """Count forward and backward passes of a number of images."""
        with torch.no_grad(), flop_counter() as counter:
            model(image)
        whole = counter.get_total_flops()
        self.executed += 3 * whole * samples
        self.if_skipped += 3 * (whole - _skippable(model, image)) * samples


def _skippable(model: nn.Module, image: Tensor) -> float:
    """FLOPs of one image that multiply by weights that are zero."""
    data = [(image, torch.zeros(1, dtype=torch.long, device=image.device))]
    calibration = Calibration(model, data, nn.functional.cross_entropy)
    values = calibration.space.values()
    return sum(
        flops * int((values[name] == 0).sum())
        for name, flops in flops_per_weight(calibration).items()
    )


@dataclass
class Run:
    """One training of one model."""

    model: nn.Module
    x: Tensor
    y: Tensor
    epochs: int
    rate: float
    seed: int
    ledger: Ledger = field(default_factory=Ledger)

    def calibration(self) -> Calibration:
        """Data, model and loss for the scores."""
        loader = DataLoader(TensorDataset(self.x, self.y), batch_size=512, shuffle=True)
        samples = min(SAMPLES, len(self.x))
        return Calibration(
            self.model, loader, nn.functional.cross_entropy, num_samples=samples, seed=self.seed
        )

    def scored(self, times: int) -> None:
        """Count the scoring with the model as it is."""
        self.ledger.add(self.model, self.x[:1], times * min(SAMPLES, len(self.x)))

    def train(
        self, after_epoch: Callable[[int, torch.optim.Optimizer], None] | None = None
    ) -> None:
        """Train in place."""
        torch.manual_seed(self.seed)
        # Faster on a CPU; not earlier, because torch-pruning's functions view weights as vectors.
        self.model.to(memory_format=torch.channels_last)
        batches = len(self.x) // 128
        optimizer = torch.optim.SGD(
            self.model.parameters(), self.rate, momentum=0.9, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.rate, total_steps=self.epochs * batches
        )
        for epoch in range(self.epochs):
            self.model.eval()
            self.ledger.add(self.model, self.x[:1], batches * 128)
            self.model.train()
            for images, labels in self._batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(images), labels).backward()
                optimizer.step()
                schedule.step()
            if after_epoch is not None:
                after_epoch(epoch, optimizer)
        self.model.eval()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), device=self.x.device)
        for chosen in order[: len(order) // 128 * 128].split(128):
            images = self.x[chosen]
            flipped = torch.rand(len(images), device=images.device) < 0.5
            yield torch.where(flipped[:, None, None, None], images.flip(3), images), self.y[chosen]


def dense(run: Run, weights: float, units: float) -> None:
    """Nothing is removed."""
    run.train()


def snipit_before(run: Run, weights: float, units: float, batch_norm: str = "running") -> None:
    """Weights, before training, with PyTorch's own function."""
    params = prunable_parameters(run.model)
    run.scored(len(halving_path(weights)))
    calibration = run.calibration()
    prune.global_unstructured(
        params,
        pruning_method=SNIPit,
        amount=weights,
        calibration=calibration,
        batch_norm=batch_norm,
    )
    run.train()
    for module, name in params:
        prune.remove(module, name)


def snapit_before(run: Run, weights: float, units: float, batch_norm: str = "running") -> None:
    """Units, before training, cut out for good."""
    path = halving_path(units)
    run.scored(len(path))
    importance = SNAPitImportance(run.calibration(), batch_norm=batch_norm)
    shrink(run.model, run.x[:2], importance, sparsity=units, target="channels", steps=path)
    run.train()


def random_before(run: Run, weights: float, units: float) -> None:
    """As many units at random."""
    shrink(run.model, run.x[:2], RandomImportance(run.seed), sparsity=units, target="channels")
    run.train()


def snapit_during(run: Run, weights: float, units: float) -> None:
    """Units, one step of the path after each of the first epochs; the optimizer follows."""
    path = halving_path(units)
    importance = SNAPitImportance(run.calibration())
    whole = sum(group.units for group in find_groups(run.model, run.x[:2]))

    def cut(epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch >= len(path) or epoch == run.epochs - 1:
            return
        target = path[-1] if epoch == run.epochs - 2 else path[epoch]
        left = sum(group.units for group in find_groups(run.model, run.x[:2]))
        gone = 1 - left / whole
        if target > gone:
            run.model.eval()
            run.scored(1)
            shrink(
                run.model,
                run.x[:2],
                importance,
                sparsity=amount_between(gone, target),
                target="channels",
                optimizer=optimizer,
            )

    run.train(cut)


ROWS: dict[str, Callable[[Run, float, float], None]] = {
    "dense": dense,
    "random before, units": random_before,
    "SNIP-it before, weights": snipit_before,
    "SNAP-it before, units": snapit_before,
    "SNAP-it during, units": snapit_during,
    "SNIP-it before, weights, statistics of batches": partial(snipit_before, batch_norm="batch"),
    "SNAP-it before, units, statistics of batches": partial(snapit_before, batch_norm="batch"),
}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers in percent, in batches."""
    pairs = zip(x.split(500), y.split(500), strict=True)
    return 100.0 * sum(int((model(a).argmax(1) == b).sum()) for a, b in pairs) / len(x)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--width", type=float, default=0.25, help="of the published networks")
    parser.add_argument("--weights", type=float, default=0.95, help="sparsity in weights")
    parser.add_argument("--units", type=float, default=0.7, help="sparsity in units")
    parser.add_argument("--train-images", type=int, default=20000)
    parser.add_argument("--test-images", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/snipit_cifar.json"))
    return parser.parse_args()


def one_run(
    given: argparse.Namespace, name: str, row: str, seed: int, train: Data, test: Data
) -> dict[str, float | int | str]:
    """Train one model in one way."""
    torch.manual_seed(seed)
    model = MODELS[name](given.width).to(given.device).eval()
    run = Run(model, train[0], train[1], given.epochs, given.rate, seed)
    dense_training = Ledger()
    dense_training.add(model, run.x[:1], len(run.x) // 128 * 128 * given.epochs)
    whole, started = dense_training.executed, time.process_time()
    ROWS[row](run, given.weights, given.units)
    return {
        "model": name,
        "row": row,
        "seed": seed,
        "accuracy": accuracy(model, *test),
        "parameters": sum(int((p != 0).sum()) for p in model.parameters()),
        "training_flops": run.ledger.executed / whole,
        "if_skipped": run.ledger.if_skipped / whole,
        "cpu_seconds": time.process_time() - started,
    }


def main() -> None:
    """Print and write a row at a time, then print the table."""
    given = options()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    table = ResultsTable()
    train = _on(given.device, load_cifar10(given.data, "train", given.train_images))
    test = _on(given.device, load_cifar10(given.data, "test", given.test_images))
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    for row, seed, name in product(given.rows, seeds, given.models):
        found = one_run(given, name, row, seed, train, test)
        print(found, flush=True)
        table.add(**found)
        table.to_json(given.output)
    values = ["accuracy", "parameters", "training_flops", "if_skipped", "cpu_seconds"]
    print(table.summarise(by=["model", "row"], values=values))


def _on(device: str, data: Data) -> Data:
    return data[0].to(device), data[1].to(device)


if __name__ == "__main__":
    main()
