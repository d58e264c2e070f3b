"""BMRS and its baselines on MNIST: accuracy against what real shrinking leaves.

The recipe is that of Wright, Igel and Selvan (2024, arXiv:2406.01345), tables 1 and C: an MLP of
eight layers of 100 units (7×100 and the input layer) and LeNet-5, 32×32 images, 80 % of the
training images to train on, Adam with the paper's learning rates, pruning after every epoch. There
are fewer epochs: some without gates, which all rows of a seed share and which stand for those of
the paper in which gates are still narrow, then some with gates whose learning rate is larger. Then
closed units are cut out, and the small network is fine-tuned without gates; the paper fine-tunes
with them. What is counted are the parameters of the networks that are left. The paper counts zeros,
those of the gates included.

    python -m tests.benchmarks.bmrs_mnist --networks mlp --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.bmrs_recipe import (
    RATES,
    Formatter,
    Images,
    accuracy,
    add_options,
    build,
    train_dense,
    train_gated,
)
from torchprune_bayes.gates import (
    BMRSNormal,
    BMRSUniform,
    Criterion,
    find_criterion,
    fold_gates,
    gates_of,
)
from torchprune_bayes.reports import ResultsTable, compare_speed
from torchprune_bayes.structured import UnitCosts, shrink
from torchprune_bayes.structured.importances.bmrs import BMRSImportance

CRITERIA: dict[str, Criterion] = {
    "BMRS_N": BMRSNormal(),
    "BMRS_U-8": BMRSUniform(8),
    "BMRS_U-4": BMRSUniform(4),
    "BMRS_U-8 hole": BMRSUniform(8, p2=23, tau=0),
    "BMRS_U-4 hole": BMRSUniform(4, p2=23, tau=0),
    "BMRS_N tau=0": BMRSNormal(tau=0),
    "SNR": find_criterion("snr"),
    "E[theta]": find_criterion("mean"),
}
# Compared at the share of closed gates that BMRS_N came to, as in the paper.
MATCHED = {"L2": find_criterion("l2")}
# Compression and accuracy of the paper's table 1, 10 seeds, 50 epochs.
PAPER = {
    "mlp": {
        "dense": (0, 97.43),
        "L2": (43.11, 10.39),
        "E[theta]": (52.08, 96.88),
        "SNR": (58.57, 96.92),
        "BMRS_N": (48.86, 96.95),
        "BMRS_U-8": (48.73, 96.93),
        "BMRS_U-4": (54.47, 96.99),
    },
    "lenet5": {
        "dense": (0, 99.07),
        "L2": (83.42, 11.35),
        "E[theta]": (88.29, 51.30),
        "SNR": (92.66, 62.70),
        "BMRS_N": (86.90, 95.59),
        "BMRS_U-8": (86.11, 95.27),
        "BMRS_U-4": (87.58, 96.66),
    },
}


def train(
    model: nn.Module,
    images: Images,
    arguments: argparse.Namespace,
    criterion: Criterion | None,
    amount: float | None = None,
) -> tuple[nn.Module, float]:
    """Train with gates and prune after every epoch; shrink, fine-tune, and take the best epoch.

    Without a criterion the network has no gates; then it is trained afresh, as long as the others
    in all. With an amount it is pruned once, by that much. Returns the percentage of closed gates
    along with the network.
    """
    rate = RATES[arguments.network]
    if criterion is None:
        total = arguments.pretrain + arguments.epochs + arguments.finetune
        return train_dense(model, images, rate, total), 0.0
    training = train_gated(
        model,
        images,
        arguments,
        criterion=criterion,
        prune_every=1 if amount is None else None,
        amount=amount,
        beyond=amount is not None,
    )
    training.begin_finetuning()
    closed = 100.0 * training.gates.closed / training.gates.units
    model = shrunk(model, images.test[0][:4])
    return train_dense(model, images, rate, arguments.finetune), closed


def shrunk(model: nn.Module, example: Tensor) -> nn.Module:
    """Fold the gates and cut out what is closed, and nothing else."""
    model.eval()
    importance = BMRSImportance(gates_of(model), criterion=None)
    fold_gates(model)
    shrink(model, example, importance, target="evidence")  # compares with the masked model
    return model


def main() -> None:
    """Print the table and write it as JSON."""
    arguments = _parser().parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    images = Images.load(arguments.data, arguments.device)
    table = ResultsTable()
    for network in arguments.networks:
        arguments.network = network
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            closed = None
            torch.manual_seed(seed)
            start_from = build(network).to(arguments.device)
            train_dense(start_from, images, RATES[network], arguments.pretrain)
            for name in arguments.criteria:
                start = time.perf_counter()
                found = row(name, seed, images, arguments, closed, start_from)
                closed = found["gates_closed"] if name == "BMRS_N" else closed
                table.add(**found, seconds=time.perf_counter() - start)
                print(list(table)[-1], flush=True)
                table.to_json(arguments.output)
    print(beside_the_paper(table).to_text())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_options(parser)
    parser.add_argument("--networks", nargs="+", choices=list(PAPER), default=list(PAPER))
    rows = ["dense", *CRITERIA, *MATCHED]
    parser.add_argument("--criteria", nargs="+", choices=rows, default=rows, help="rows")
    parser.add_argument("--finetune", type=int, default=10, help="epochs of the shrunk network")
    parser.add_argument("--output", type=Path, default=Path("results/bmrs_mnist.json"))
    return parser


def beside_the_paper(table: ResultsTable) -> ResultsTable:
    """Means over the seeds with the paper's rows."""
    columns = ["gates_closed", "compression", "flops", "speedup", "accuracy"]
    found = ResultsTable()
    for row in table.summarise(["network", "criterion"], columns):
        published = PAPER[str(row["network"])].get(str(row["criterion"]))
        names = ("paper_compression", "paper_accuracy")
        found.add(**row, **dict(zip(names, map(float, published or ()), strict=False)))
    return found


def row(
    name: str,
    seed: int,
    images: Images,
    arguments: argparse.Namespace,
    matched: float | None,
    start_from: nn.Module,
) -> dict[str, Any]:
    """Train, shrink and measure one network; ``matched`` is the share of gates L2 closes."""
    torch.manual_seed(seed)
    model: nn.Module = build(arguments.network).to(arguments.device)
    if name != "dense":
        model = copy.deepcopy(start_from)
    whole = copy.deepcopy(model)
    if name in MATCHED:
        if matched is None:
            raise ValueError(f"Expected BMRS_N before {name}, whose share of gates it closes.")
        model, closed = train(model, images, arguments, MATCHED[name], matched / 100.0)
    else:
        model, closed = train(model, images, arguments, CRITERIA.get(name))
    return {
        "network": arguments.network,
        "criterion": name,
        "kl": arguments.kl,
        "seed": seed,
        "gates_closed": closed,
        **sizes(whole, model, images.test[0][:256]),
        "accuracy": accuracy(model, images.test),
    }


def sizes(whole: nn.Module, left: nn.Module, x: Tensor) -> dict[str, float]:
    """Percentages of parameters and FLOPs that are gone, and how much faster 256 images are."""
    before, after = (UnitCosts.measure(model, (), x) for model in (whole, left))
    speed = compare_speed(whole, left, x, pairs=49)
    return {
        "compression": 100.0 * (1 - after.parameters({}) / before.parameters({})),
        "flops": 100.0 * (1 - after.flops({}) / before.flops({})),
        "speedup": speed.speedup,
    }


if __name__ == "__main__":
    main()
