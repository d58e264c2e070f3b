"""From gradients to scores: our kernel against the literal rank-one recursion, in one run.

    python -m tests.benchmarks.fisher_speed

Random gradients of one block. The recursion is the papers' loop over gradients, each with a
matrix-vector product and a rank-one update of the whole inverse; both end in the inverse diagonal.
"""

from __future__ import annotations

import argparse
import time

import torch

from tests.references.fisher import inverse_by_recursion
from torchprune_bayes._numerics.fisher_blocks import invert


def main() -> None:
    """Time both and print the ratio and the largest relative difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", type=int, default=2000, help="entries of the block")
    parser.add_argument("--gradients", type=int, default=400)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=5, help="of ours; the recursion runs once")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    gradients = torch.randn(arguments.gradients, arguments.block) * 0.07
    for dtype in (torch.float64, torch.float32):
        rows = gradients.to(dtype)
        start = time.perf_counter()
        slow = inverse_by_recursion(rows, arguments.damping).diagonal().double()
        recursion_seconds = time.perf_counter() - start
        times = []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            fast = invert(rows.unsqueeze(0), arguments.damping).inverse_diagonal()[0]
            times.append(time.perf_counter() - start)
        ours_seconds = sorted(times)[len(times) // 2]
        difference = float(((fast - slow) / slow).abs().max())
        print(
            f"{dtype}: recursion {recursion_seconds:.2f} s, ours {ours_seconds:.4f} s (median), "
            f"{recursion_seconds / ours_seconds:.0f} times faster, "
            f"largest relative difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
