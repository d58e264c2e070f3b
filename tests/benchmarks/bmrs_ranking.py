"""One trained network with gates, closed by every criterion: the post-training mode of BMRS.

Per seed one network is trained with gates of which none closes (arXiv:2406.01345, section 5.2), and
all that follows starts from copies of it. What is closed is cut out for real, and what is left is
trained for one more epoch, as in the paper. Written are

* what each criterion closes by itself, and the sweep over p1 of BMRS_U,
* curves of accuracy against parameters, gates closed one after the other by each ranking, with the
  point at which the criterion stops,
* rank correlations of the criteria over all gates,

as JSON files, a LaTeX table and a figure.

    python -m tests.benchmarks.bmrs_ranking --network mlp --first-seed 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.benchmarks.bmrs_mnist import CRITERIA
from tests.benchmarks.bmrs_recipe import (
    RATES,
    Formatter,
    Images,
    accuracy,
    add_options,
    build,
    epoch,
    train_dense,
    train_gated,
)
from torchprune_bayes.gates import Criterion, find_criterion
from torchprune_bayes.reports import (
    ResultsTable,
    compression_curve,
    plot_accuracy_against_compression,
    rank_correlations,
    stopping_points,
    sweep_p1,
)

NORM = {"L2": find_criterion("l2")}  # has no stopping point of its own
RANKED = ("BMRS_N", "BMRS_U-8", "BMRS_U-8 hole", "SNR", "E[theta]", "L2")
BITS = (16, 12, 8, 6, 4, 2, 1)


def finetune(images: Images, rate: float) -> Callable[[nn.Module], None]:
    """One epoch without gates, of the same batches for every copy."""

    def train(model: nn.Module) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            epoch(model, images.train, torch.optim.Adam(model.parameters(), rate, fused=True), None)

    return train


def trained(images: Images, arguments: argparse.Namespace, seed: int) -> nn.Module:
    """A network with gates, all of them open."""
    torch.manual_seed(seed)
    model = build(arguments.network).to(arguments.device)
    train_dense(model, images, RATES[arguments.network], arguments.pretrain)
    train_gated(model, images, arguments, prune_every=None)
    return model.eval()


def reports_of(
    model: nn.Module, images: Images, arguments: argparse.Namespace
) -> dict[str, ResultsTable]:
    """All tables of one trained network."""
    criteria: dict[str, Criterion] = {**CRITERIA, **NORM}
    common: dict[str, Any] = {
        "finetune": finetune(images, RATES[arguments.network]),
        "example_inputs": images.test[0][:256],
    }

    def measure(twin: nn.Module) -> float:
        return accuracy(twin, images.test)

    curves = ResultsTable()
    for name in arguments.ranked:
        curve = compression_curve(model, measure, criteria[name], levels=arguments.levels, **common)
        for row in curve:
            if not (row["stop"] and name in NORM):
                curves.add(criterion=name, **row)
    return {
        "points": stopping_points(model, CRITERIA, measure, pairs=49, **common),
        "sweep": sweep_p1(model, BITS, measure, **common),
        "correlations": rank_correlations(model, criteria),
        "curves": curves,
    }


SUMMARIES = {
    "points": (["criterion"], ["closed", "parameters", "flops", "speedup", "metric"]),
    "sweep": (["p1"], ["closed", "parameters", "metric"]),
    "correlations": (["first", "second"], ["spearman", "kendall"]),
}


def main() -> None:
    """Run all seeds and write what was found after each."""
    arguments = _parser().parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    images = Images.load(arguments.data, arguments.device)
    tables = {name: ResultsTable() for name in (*SUMMARIES, "curves")}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        model = trained(images, arguments, seed)
        open_accuracy = accuracy(model, images.test)
        print(f"seed {seed}: {open_accuracy:.2f} with all gates open", flush=True)
        for name, table in reports_of(model, images, arguments).items():
            for row in table:
                tables[name].add(seed=seed, **row)
            tables[name].to_json(arguments.output / f"{name}.json")
        _draw(tables["curves"], arguments)
    for name, (by, values) in SUMMARIES.items():
        summary = tables[name].summarise(by, values)
        print(summary, end="\n\n")
        (arguments.output / f"{name}.tex").write_text(summary.to_latex() + "\n")


def _draw(curves: ResultsTable, arguments: argparse.Namespace) -> None:
    rows = ResultsTable({**row, "accuracy": row["metric"]} for row in curves)
    path = arguments.output / "curves.png"
    plot_accuracy_against_compression(rows, path, y="accuracy", title=arguments.network)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_options(parser)
    parser.add_argument("--network", choices=list(RATES), default="mlp")
    parser.add_argument("--ranked", nargs="+", choices=[*CRITERIA, *NORM], default=list(RANKED))
    parser.add_argument("--levels", type=int, default=11)
    parser.add_argument("--output", type=Path, default=Path("results/bmrs_ranking"))
    return parser


if __name__ == "__main__":
    main()
