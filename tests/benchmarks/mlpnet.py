"""MLPNet on MNIST: the published one-shot tables, and ours beside them.

    python -m tests.benchmarks.mlpnet --data ../shared/data
    python -m tests.benchmarks.mlpnet --data ../shared/data --rows multi taylor --seeds 5

Test accuracy in percent without fine-tuning, mean and sample standard deviation over seeds that
draw different calibration samples; CPU seconds are those of one pruning call with its data.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from torch import nn

from tests.references.mlpnet import accuracy, load_mlpnet, load_mnist, shuffled_batches
from torchprune_bayes import Calibration, prune_global
from torchprune_bayes.methods import find_method
from torchprune_bayes.reports import ResultsTable

PAPER = {"block_size": "tensor", "damping": 1e-5, "update": "single", "update_scale": 1.0}
ONE_SHOT = {"num_samples": 1000}
FULL = {"block_size": "full"}
GEOMETRIC = {"steps": 16, "path": "geometric"}
STEPS = {"num_samples": 500 * 32, "mini_batch": 32}
MORE = {"num_samples": 1000 * 32, "mini_batch": 32}

# name: method, sparsities, options of the calibration, options of the method
ROWS: dict[str, tuple[str, list[float], dict[str, Any], dict[str, Any]]] = {
    "magnitude": ("magnitude", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98], {}, {"compat": "paper"}),
    "paper": ("woodfisher", [0.5, 0.8, 0.9, 0.95], {"num_samples": 100}, PAPER),
    "kfac-paper": ("kfac", [0.95], {"num_samples": 100}, {"damping": 1e-5, "pi": False}),
    "kfac": ("kfac", [0.8, 0.9, 0.95], ONE_SHOT, {}),
    "diagonal": ("diagonal-fisher", [0.95], {"num_samples": 4096}, {"scope": "layer"}),
    "one-shot": ("woodfisher", [0.9, 0.95, 0.98], ONE_SHOT, {}),
    "multi": ("woodfisher", [0.8, 0.9, 0.95, 0.98], MORE, FULL | GEOMETRIC),
    "taylor": ("woodtaylor", [0.5, 0.8, 0.9, 0.95, 0.98], STEPS, FULL | {"steps": 32}),
}


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of data")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--sparsities", nargs="+", type=float, help="only these of each row")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/mlpnet.json"))
    arguments = parser.parse_args()
    train_x, train_y, test_x, test_y = load_mnist(arguments.data)
    loader = shuffled_batches(train_x, train_y)
    table = ResultsTable()
    for row in arguments.rows:
        name, sparsities, sampling, options = ROWS[row]
        for sparsity in arguments.sparsities or sparsities:
            count = arguments.seeds if sampling else 1
            for seed in range(arguments.first_seed, arguments.first_seed + count):
                model = load_mlpnet(arguments.data)
                layers = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
                params: list[tuple[nn.Module, str]] = [(layer, "weight") for layer in layers]
                extra = dict(options)
                if find_method(name).needs_calibration:
                    extra["calibration"] = Calibration(
                        model, loader, nn.functional.cross_entropy, params, seed=seed, **sampling
                    )
                start = time.process_time()
                prune_global(params, name, amount=sparsity, **extra)
                seconds = time.process_time() - start
                found = accuracy(model, test_x, test_y)
                print(
                    f"{row:10} {sparsity:.2f} seed {seed}: {found:.2f} in {seconds:.1f} s",
                    flush=True,
                )
                table.add(row=row, sparsity=sparsity, seed=seed, accuracy=found, seconds=seconds)
    print(table.summarise(["row", "sparsity"], ["accuracy", "seconds"]).to_text())
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_json(arguments.output)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and shows defaults."""


if __name__ == "__main__":
    main()
