"""Accuracy and speed of CBS on MLPNet and MNIST: ``python -m tests.benchmarks.cbs``.

Every accuracy is after one call and no training, at the exact sparsity: the mean over the seeds,
their standard deviation in brackets, and the time of a call. The second table races the search
against the literal one.
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
from torch.utils.data import DataLoader, TensorDataset

from tests.references.cbs_literal import literal_search
from tests.references.mlpnet import accuracy, load_mlpnet, load_mnist
from torchprune_bayes import Calibration, EmpiricalFisher, prune_global
from torchprune_bayes._numerics.swaps import SelectionObjective, swap_search

ONE_SHOT: dict[str, dict[str, Any]] = {
    "CBS-S": {"method": "cbs", "update": "none", "damping": 1e-2},
    "CBS-S+U": {"method": "cbs"},
    "CBS post-update": {"method": "cbs-post-update", "damping": 1e-3},
}
MULTI_STEP: dict[str, dict[str, Any]] = {
    "multi-step": {
        "method": "cbs",
        "damping": 1e-3,
        "gradient_step": "auto",
        "initial": "woodfisher",
        "max_iterations": 0,
        "update_scale": 1.0,
    },
}


def main() -> None:
    """Print both tables."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    model, data = load_mlpnet(arguments.data), load_mnist(arguments.data)
    columns = {name: (_one_shot(arguments), options) for name, options in ONE_SHOT.items()}
    columns |= {name: (_multi_step(arguments), options) for name, options in MULTI_STEP.items()}
    chosen = arguments.columns or list(columns)
    print("sparsity", *chosen, sep=" | ")
    for sparsity in arguments.sparsities:
        cells = [_cell(model, data, sparsity, arguments.seeds, *columns[name]) for name in chosen]
        print(sparsity, *cells, sep=" | ", flush=True)
    if arguments.race:
        _race(model, data, arguments)


def _cell(
    model: nn.Module,
    data: tuple[Tensor, ...],
    sparsity: float,
    seeds: int,
    sampling: dict[str, Any],
    options: dict[str, Any],
) -> str:
    found = []
    started = time.perf_counter()
    for seed in range(seeds):
        pruned = copy.deepcopy(model)
        calibration = _calibration(pruned, data, seed, sampling)
        steps = {"steps": sampling["steps"]} if "steps" in sampling else {}
        prune_global(None, amount=sparsity, calibration=calibration, **steps, **options)
        found.append(accuracy(pruned, *data[2:]))
    seconds = (time.perf_counter() - started) / seeds
    return f"{statistics.mean(found):.2f} ({statistics.pstdev(found):.2f}) {seconds:.0f} s"


def _calibration(
    model: nn.Module, data: tuple[Tensor, ...], seed: int, sampling: dict[str, Any]
) -> Calibration:
    train = TensorDataset(*data[:2])
    # Shuffled by the calibration's seed, so that every step of several sees other samples.
    loader = DataLoader(train, batch_size=1000, shuffle=True)
    options = {key: sampling[key] for key in ("num_samples", "mini_batch")}
    return Calibration(model, loader, cross_entropy, seed=seed, memory_mb=8192.0, **options)


def _one_shot(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"num_samples": arguments.samples, "mini_batch": 1}


def _multi_step(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"num_samples": 500 * 32, "mini_batch": 32, "steps": arguments.steps}


def _race(model: nn.Module, data: tuple[Tensor, ...], arguments: argparse.Namespace) -> None:
    """Time until the search reaches what the literal one has reached, from magnitude at 95 %."""
    sampling = {"num_samples": 1000, "mini_batch": 1}
    fisher = EmpiricalFisher(block_size="full").fit(_calibration(model, data, 0, sampling))
    ((_, gradients),) = fisher.sweep()
    flat = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    kept = flat.abs().topk(round(0.05 * len(flat))).indices
    start = torch.zeros_like(flat).bool().scatter(0, kept, True)

    def value(keep: Tensor) -> float:
        return float(SelectionObjective(gradients, flat[None], keep[None]).value())

    begin = time.perf_counter()
    *_, slow = literal_search(gradients[0], flat, start, max_iterations=arguments.race)
    literal, goal = time.perf_counter() - begin, value(slow)
    begin = time.perf_counter()
    for keep in swap_search(SelectionObjective(gradients, flat[None], start[None])):
        fast = time.perf_counter() - begin
        reached = value(keep[0])
        if reached <= goal:
            break
        begin = time.perf_counter() - fast
    print(f"objective: start {value(start):.4f}, literal {goal:.4f}, tiles {reached:.4f}")
    print(f"seconds: literal {literal:.2f}, tiles {fast:.3f}, ratio {literal / fast:.0f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--samples", type=int, default=1000, help="gradients in one shot")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--columns", nargs="+", choices=[*ONE_SHOT, *MULTI_STEP])
    parser.add_argument("--race", type=int, default=5, help="literal iterations; 0 skips the race")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
