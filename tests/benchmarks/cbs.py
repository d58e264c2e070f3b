"""Accuracy, speed and memory of CBS on MLPNet and MNIST: ``python -m tests.benchmarks.cbs``.

    python -m tests.benchmarks.cbs --data ../shared/data
    python -m tests.benchmarks.cbs --data ../shared/data --seeds 1 --columns CBS-S
    python -m tests.benchmarks.cbs --data ../shared/data --only-race

Every accuracy is after one call and no training, at the exact sparsity: the mean over seeds that
draw different samples, the standard deviation in brackets, and the seconds of a call. After the
table the search races the literal one from the same start; see ``cbs_race``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.benchmarks.cbs_race import race
from tests.references.mlpnet import accuracy, load_mlpnet, load_mnist, shuffled_batches
from torchprune_bayes import Calibration, prune_global

ONE_SHOT: dict[str, dict[str, Any]] = {
    "CBS-S": {"method": "cbs", "update": "none", "damping": 1e-2},
    "CBS-S+U": {"method": "cbs"},
    "CBS-S+U, paper": {"method": "cbs", "damping": 1e-3, "block_size": "full"},
    "CBS post-update": {"method": "cbs-post-update", "damping": 1e-3},
    "post-update from WoodFisher": {
        "method": "cbs-post-update",
        "initial": "woodfisher",
        "stages": 4,
        "max_iterations": 20,
    },
    "WoodFisher, 8 stages": {
        "method": "woodfisher",
        "damping": 1e-3,
        "block_size": "full",
        "stages": 8,
    },
}
_MULTI_STEP: dict[str, Any] = {
    "method": "cbs",
    "gradient_step": "auto",
    "initial": "woodfisher",
    "block_size": "full",
}
# What the search adds to the steps is the difference of the two.
MULTI_STEP: dict[str, dict[str, Any]] = {
    "multi-step": _MULTI_STEP | {"max_iterations": 10},
    "multi-step, no swaps": _MULTI_STEP | {"max_iterations": 0},
}
PUBLISHED = {  # the authors' draft table, CBS-S / CBS-S+U
    0.8: "93.59 / 93.90",
    0.9: "92.37 / 93.14",
    0.95: "88.24 / 88.92",
    0.98: "66.64 / 55.45",
}


def main() -> None:
    """Print the table and the race."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    data = load_mnist(arguments.data)
    model = load_mlpnet(arguments.data)
    if not arguments.only_race:
        _table(model, data, arguments)
    if arguments.race:
        calibration = _calibration(model, data, 0, num_samples=arguments.race_samples)
        print(race(calibration, sparsity=0.95, iterations=arguments.race), flush=True)


def _table(model: nn.Module, data: tuple[Tensor, ...], arguments: argparse.Namespace) -> None:
    chosen = arguments.columns or [*ONE_SHOT, *MULTI_STEP]
    print("sparsity", "authors' S / S+U", *chosen, sep=" | ")
    for sparsity in arguments.sparsities:
        cells = [_cell(model, data, sparsity, name, arguments) for name in chosen]
        print(sparsity, PUBLISHED.get(sparsity, ""), *cells, sep=" | ", flush=True)


def _cell(
    model: nn.Module,
    data: tuple[Tensor, ...],
    sparsity: float,
    name: str,
    arguments: argparse.Namespace,
) -> str:
    found = []
    started = time.perf_counter()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        pruned = copy.deepcopy(model)
        if name in MULTI_STEP:
            rows = {"num_samples": 32 * arguments.step_gradients, "mini_batch": 32}
            options = MULTI_STEP[name] | {"steps": arguments.steps}
        else:
            rows, options = {"num_samples": arguments.samples}, ONE_SHOT[name]
        calibration = _calibration(pruned, data, seed, **rows)
        prune_global(None, amount=sparsity, calibration=calibration, **options)
        found.append(accuracy(pruned, *data[2:]))
        print(f"# {name}, {sparsity}, seed {seed}: {found[-1]:.2f}", flush=True)
    seconds = (time.perf_counter() - started) / arguments.seeds
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.mean(found):.2f} ({spread:.2f}) {seconds:.0f} s"


def _calibration(
    model: nn.Module, data: tuple[Tensor, ...], seed: int, **options: int
) -> Calibration:
    # Shuffled by the calibration's seed, so that every step of several sees other samples.
    loader = shuffled_batches(*data[:2])
    return Calibration(
        model,
        loader,
        cross_entropy,
        seed=seed,
        memory_mb=8192.0,
        num_samples=options["num_samples"],
        mini_batch=options.get("mini_batch", 1),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(PUBLISHED))
    parser.add_argument("--samples", type=int, default=1000, help="gradients in one shot")
    parser.add_argument("--steps", type=int, default=32, help="of the multi-step columns")
    parser.add_argument("--step-gradients", type=int, default=500, help="gradients of a step")
    parser.add_argument("--columns", nargs="+", choices=[*ONE_SHOT, *MULTI_STEP])
    parser.add_argument("--race", type=int, default=5, help="literal iterations; 0 skips the race")
    parser.add_argument("--race-samples", type=int, default=1000)
    parser.add_argument("--only-race", action="store_true", help="print no table")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
