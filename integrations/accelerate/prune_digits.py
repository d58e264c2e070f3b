"""Prune in several processes, in a training loop of your own.

A convolutional net on scikit-learn's digits; offline, a minute on two cores:

    python integrations/accelerate/prune_digits.py
    torchrun --nproc_per_node 2 integrations/accelerate/prune_digits.py --cpu
    accelerate launch --multi_gpu --num_processes 2 integrations/accelerate/prune_digits.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes import GradualPruner, cubic, prunable_parameters, registered_methods
from torchprune_bayes.integrations.accelerate import calibrate, check_same_masks, step
from torchprune_bayes.reports import MetricSums
from torchprune_bayes.schedules import Schedule

# Those of whole units need gates, or belong into `shrink`.
METHODS = sorted(name for name, entry in registered_methods().items() if not entry.is_structured)


def network() -> nn.Sequential:
    """A small convolutional net for images of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def images() -> tuple[TensorDataset, TensorDataset]:
    """Images to train on and images to evaluate on."""
    digits = load_digits()
    inputs = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    return TensorDataset(inputs[:1400], labels[:1400]), TensorDataset(inputs[1400:], labels[1400:])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", default="woodfisher", choices=METHODS)
    add("--sparsity", type=float, default=0.9)
    add("--epochs", type=int, default=8)
    add("--batch-size", type=int, default=32, help="of each process")
    add("--lr", type=float, default=5e-3)
    add("--accumulate", type=int, default=1, help="batches per update")
    add("--calibration-samples", type=int, default=256, help="over all processes")
    add("--mixed-precision", default="no", choices=["no", "fp16", "bf16"])
    add("--cpu", action="store_true")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("output/accelerate"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, prune, evaluate, save."""
    args = parse(argv)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
    )
    set_seed(args.seed)
    training, test = images()
    model = network()
    params = prunable_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = DataLoader(training, batch_size=args.batch_size, shuffle=True)
    model, optimizer, prepared = accelerator.prepare(model, optimizer, loader)
    calibration = calibrate(
        accelerator,
        model,
        loader,
        cross_entropy,
        params=params,
        num_samples=args.calibration_samples,
        seed=args.seed,
    )
    pruner = GradualPruner(
        None,
        args.method,
        schedule_of(args, len(prepared)),
        calibration=calibration,
        optimizer=optimizer,
    )
    train(accelerator, model, optimizer, prepared, pruner, args.epochs)
    digest = check_same_masks(pruner.masks)
    found = evaluate(accelerator, model, test)
    accelerator.print(
        f"{accelerator.num_processes} processes, sparsity {pruner.sparsity:.4f}, "
        f"accuracy {100 * found['accuracy']:.2f} %, nll {found['nll']:.4f}, "
        f"ece {found['ece']:.4f}, masks {digest[:8]}"
    )
    accelerator.save_model(model, args.output)
    return found | {"sparsity": pruner.sparsity}


def schedule_of(args: argparse.Namespace, batches: int) -> Schedule:
    """Prune eight times in the middle half of the training."""
    updates = args.epochs * -(-batches // args.accumulate)
    begin, end = updates // 4, 3 * updates // 4
    return cubic(args.sparsity, begin, end, times=8)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    pruner: GradualPruner,
    epochs: int,
) -> None:
    """Train and prune."""
    for _ in range(epochs):
        model.train()
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step(accelerator, pruner)


def evaluate(accelerator: Accelerator, model: nn.Module, test: TensorDataset) -> dict[str, float]:
    """Measure on all test images, every one once."""
    loader = accelerator.prepare(DataLoader(test, batch_size=100))
    sums = MetricSums()
    model.eval()
    for inputs, labels in loader:
        with torch.no_grad():
            logits = model(inputs)
        # Not `gather`: the last batches of the processes overlap.
        sums.update(*accelerator.gather_for_metrics((logits.float(), labels)))
    metrics = sums.compute()
    return {"accuracy": metrics.accuracy, "nll": metrics.nll, "ece": metrics.ece}


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
