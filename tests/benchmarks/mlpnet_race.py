"""CPU seconds of two versions of the library on MLPNet, in turn on one machine.

    git archive 4fe53d3 | tar -x -C OLD    # release 0.1.0
    python -m tests.benchmarks.mlpnet_race --data ../shared/data --old OLD --seeds 2

Every call has a process of its own, started in the folder of its version; its time is the CPU
seconds of the call alone, its accuracy that on the test images at 95 %. One thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROWS = {
    "cbs": "'cbs', dict(num_samples=10000), dict(damping=1e-3, block_size='full')",
    "woodtaylor": "'woodtaylor', dict(num_samples=16000, mini_batch=32), "
    "dict(block_size='full', steps=32)",
    "woodfisher": "'woodfisher', dict(num_samples=32000, mini_batch=32), "
    "dict(block_size='full', steps=16, path='geometric')",
}
_CALL = """
import sys, time
from pathlib import Path
import torch
from torch.nn.functional import cross_entropy
from tests.references.mlpnet import accuracy, load_mlpnet, load_mnist, shuffled_batches
from torchprune_bayes import Calibration, prune_global
torch.set_num_threads(1)
method, sampling, options = {row}
data, seed = Path(sys.argv[1]), int(sys.argv[2])
train_x, train_y, test_x, test_y = load_mnist(data)
model = load_mlpnet(data)
params = [(layer, "weight") for layer in model.children() if isinstance(layer, torch.nn.Linear)]
batches = shuffled_batches(train_x, train_y)
calibration = Calibration(model, batches, cross_entropy, params, seed=seed, **sampling)
began = time.process_time()
prune_global(params, method, amount=0.95, calibration=calibration, **options)
print(time.process_time() - began, accuracy(model, test_x, test_y))
"""


def measure(folder: Path, row: str, data: Path, seed: int) -> tuple[float, float]:
    """CPU seconds and test accuracy of one call with the library in ``folder``."""
    command = [sys.executable, "-c", _CALL.format(row=ROWS[row]), str(data), str(seed)]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    printed = subprocess.check_output(command, cwd=folder, env=environment, text=True)
    seconds, accuracy = printed.split()
    return float(seconds), float(accuracy)


def main() -> None:
    """Print a row for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--old", type=Path, required=True, help="folder of the older version")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    new, data = Path(__file__).parents[2], arguments.data.resolve()
    print("| | seed | old: accuracy, CPU s | new: accuracy, CPU s | ratio |\n|---|---|---|---|---|")
    for row in arguments.rows:
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            (before, was), (after, now) = (
                measure(folder, row, data, seed) for folder in (arguments.old.resolve(), new)
            )
            cells = f"{was:.2f}, {before:.1f} | {now:.2f}, {after:.1f} | {after / before:.2f}"
            print(f"| `{row}` | {seed} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
