"""Time and extra memory of choosing what to prune, against ``torch.nn.utils.prune``.

Each contender runs in a process of its own on the same scores, all different, so that the masks
must be equal. Extra memory is how much the peak of resident memory grows past what the scores
(and, for PyTorch, its all-ones default mask) take::

    python tests/benchmarks/selection.py --entries 100_000_000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import prune

from torchprune_bayes._numerics.selection import smallest_k


def main() -> None:
    """Run both contenders and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=10_000_000, help="number of scores")
    parser.add_argument("--amount", type=float, default=0.9, help="fraction to prune")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--run", choices=["host", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        _measure(options)
    else:
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.pt" for name in ("host", "ours")}
        results = {name: _in_subprocess(name, path, options) for name, path in paths.items()}
        same = torch.equal(*(torch.load(path) for path in paths.values()))
    host, ours = results["host"], results["ours"]
    print(f"{options.entries:,} float32 scores, {options.amount:.0%} pruned")
    print(f"{'':10}{'host':>10}{'ours':>10}{'ours/host':>12}")
    for unit in host:
        print(f"{unit:10}{host[unit]:10.2f}{ours[unit]:10.2f}{ours[unit] / host[unit]:12.3f}")
    print(f"masks equal: {same}")


def _in_subprocess(name: str, path: Path, options: argparse.Namespace) -> dict[str, float]:
    arguments = [f"--{key}={getattr(options, key)}" for key in ("entries", "amount", "threads")]
    command = [sys.executable, __file__, f"--run={name}", f"--mask={path}", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    count = round(options.amount * options.entries)
    _prepare(options.run, torch.rand(1000), 900)()  # loads what is loaded on first use
    # Bit patterns upwards of that of 1.0: positive floats, all different, in random order.
    scores = torch.randperm(options.entries, dtype=torch.int32).add_(0x3F800000)
    select = _prepare(options.run, scores.view(torch.float32), count)
    before, start = _peak_mb(), time.perf_counter()
    mask = select()
    result = {"seconds": time.perf_counter() - start, "extra_mb": _peak_mb() - before}
    torch.save(mask.bool(), options.mask)
    print(json.dumps(result))


def _prepare(name: str, scores: Tensor, count: int) -> Callable[[], Tensor]:
    if name == "ours":
        return lambda: smallest_k([scores], count)[0]
    default_mask = torch.ones_like(scores)
    return lambda: prune.L1Unstructured(amount=count).compute_mask(scores, default_mask)


def _peak_mb() -> float:
    import resource  # only on Unix

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here


if __name__ == "__main__":
    main()
