"""ResNet-20 on the JPEG copies of CIFAR-10: fine-tuned a little, then pruned without fine-tuning.

    python -m tests.benchmarks.resnet20 --data ../shared/data

The checkpoint was trained on lossless images and loses many points on the copies, so it is first
fine-tuned (SGD with momentum, one-cycle learning rate, flips) and saved beside the results; a
second run starts from there. Test accuracy in percent, mean and sample standard deviation; the
seconds of one-step methods at the first sparsity include the fit that all sparsities share.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.references.mlpnet import shuffled_batches
from tests.references.resnet20 import ResNet20, load_cifar10, load_resnet20
from torchprune_bayes import Calibration, EmpiricalFisher, prune_global
from torchprune_bayes.reports import ResultsTable

STEPS = {"steps": 8, "damping": "auto"}
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "magnitude": ("magnitude", {}, {}),
    "woodfisher, layers": ("woodfisher", {"num_samples": 1000}, {"block_size": "tensor"}),
    "woodfisher, blocks of 1000": ("woodfisher", {"num_samples": 1000}, {"block_size": 1000}),
    "woodfisher, whole network": ("woodfisher", {"num_samples": 400}, {"block_size": "full"}),
    "woodfisher, 8 steps": ("woodfisher", {"num_samples": 3200, "mini_batch": 16}, STEPS),
    "woodtaylor, 8 steps": ("woodtaylor", {"num_samples": 3200, "mini_batch": 16}, STEPS),
    "cbs, layers": ("cbs", {"num_samples": 1000}, {"block_size": "tensor"}),
    "cbs, blocks of 1000": ("cbs", {"num_samples": 1000}, {"block_size": 1000}),
    "cbs from woodfisher, blocks of 1000": (
        "cbs",
        {"num_samples": 1000},
        {"block_size": 1000, "initial": "woodfisher", "stages": 4, "max_iterations": 20},
    ),
}


def fine_tune(model: ResNet20, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    """Train in place on images ``x`` with random flips."""
    torch.manual_seed(0)
    batches = len(x) // 128
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x))[: batches * 128].split(128):
            images = x[chosen]
            flipped = torch.rand(len(images)) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers in percent, in batches."""
    right = sum(
        int((model(a).argmax(1) == b).sum())
        for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return 100.0 * right / len(x)


def prepared(arguments: argparse.Namespace, x: Tensor, y: Tensor) -> ResNet20:
    """The fine-tuned model, from its file if there is one."""
    tuned = arguments.output / "resnet20_jpeg.safetensors"
    if tuned.exists():
        return load_resnet20(tuned)
    model = load_resnet20(arguments.data / "checkpoints" / "resnet20_cifar10.safetensors")
    fine_tune(model, x, y, arguments.epochs, arguments.rate)
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), tuned)
    return model


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--train-images", type=int, default=50_000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, help="instead of each row's own number")
    parser.add_argument("--memory-mb", type=float, default=8192, help="1000 gradients take 1.1 GB")
    parser.add_argument("--output", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    x, y = load_cifar10(arguments.data, "train", arguments.train_images)
    test_x, test_y = load_cifar10(arguments.data, "test", arguments.test_images)
    dense = prepared(arguments, x, y)
    print(f"dense: {accuracy(dense, test_x, test_y):.2f}")
    table, loader = ResultsTable(), shuffled_batches(x, y)
    for row in arguments.rows:
        name, sampling, options = ROWS[row]
        if sampling and arguments.num_samples:
            sampling = sampling | {"num_samples": arguments.num_samples}
        if sampling:
            sampling = sampling | {"memory_mb": arguments.memory_mb}
        first, count = arguments.first_seed, arguments.seeds if sampling else 1
        for seed in range(first, first + count):
            curvature: EmpiricalFisher | None = None
            for sparsity in arguments.sparsities:
                model = copy.deepcopy(dense)
                params, extra = model.prunable(), dict(options)
                start = time.process_time()
                if sampling:
                    calibration = Calibration(
                        model, loader, nn.functional.cross_entropy, params, seed=seed, **sampling
                    )
                    extra["calibration"] = calibration
                if sampling and "steps" not in options:  # one fit serves all sparsities
                    blocks = extra.pop("block_size")
                    curvature = curvature or EmpiricalFisher(block_size=blocks).fit(calibration)
                    extra["curvature"] = curvature
                prune_global(params, name, amount=sparsity, **extra)
                seconds = time.process_time() - start
                found = accuracy(model, test_x, test_y)
                print(
                    f"{row} {sparsity:.2f} seed {seed}: {found:.2f} in {seconds:.0f} s", flush=True
                )
                table.add(row=row, sparsity=sparsity, seed=seed, accuracy=found, seconds=seconds)
    print(table.summarise(["row", "sparsity"], ["accuracy", "seconds"]).to_text())
    table.to_json(arguments.output / "resnet20.json")


if __name__ == "__main__":
    main()
