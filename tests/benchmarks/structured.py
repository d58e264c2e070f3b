"""Shrinking without and with repair: the recommended call against torch-pruning's importances.

    python -m tests.benchmarks.structured gpt2 vit resnet20 --data ../shared/data

The dense networks are those of ``finetuned.py``; each is trained once and kept in ``--output``. At
every fraction of the FLOPs a copy is shrunk and measured at once; with ``--fine-tune`` it is then
trained like all others, for the same few updates, and measured again.

``default`` is ``shrink(model, inputs, calibration, target="flops")``, which removes dimensions
inside of heads; ``--heads whole`` has it remove whole heads, ``--heads dimensions`` has the peers
remove dimensions as well. ``tp magnitude`` and ``tp taylor`` are torch-pruning's own pruner with
its group importances. ``magnitude``, ``taylor`` and ``hessian`` are
those importances at their default settings (mean over the layers of a group, divided by the mean of
the group's units), written for groups of any model, so that all transformers are served. Each is
ranked globally, within layers and within isomorphic groups, the best of which is chosen by the loss
on training samples that are not calibrated on, and each is run without and with the repair. The
test split is measured and nothing is chosen on it. CPU seconds are those of scoring, ranking,
repairing and choosing, ``passes`` the same in forward and backward passes over the calibration
data, measured beside them. Rows are written as they come; what is in the file is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import set_seed

from tests.benchmarks.finetuned import (
    calibration_of,
    dense_model,
    latency_ratio,
    measured,
    trainer_for,
)
from tests.benchmarks.finetuned_tasks import TASKS, Task
from tests.benchmarks.structured_peers import HOSTS, SCOPES, PeerImportance, pruned_by_host
from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes.reports import ResultsTable
from torchprune_bayes.structured import ShrinkReport, shrink
from torchprune_bayes.structured.allocation import Allocation

ALLOCATIONS: tuple[Allocation, ...] = ("global", "layer", "isomorphic")
PEERS = ("magnitude", "taylor", "hessian", *HOSTS)
TRACED = ("vit", "resnet20", "resnet18")
"""Tasks whose networks torch-pruning's own pruner is run on."""
WITHOUT_HEADS = ("resnet20", "resnet18")
SCORES = ["perplexity", "eval_loss_perplexity", "accuracy", "nll"]
SCORES += ["tuned perplexity", "tuned eval_loss_perplexity", "tuned accuracy"]
SCORES += ["seconds", "passes", "latency_ratio_1", "latency_ratio_16"]


def calibrated(task: Task, model: nn.Module, seed: int, samples: int) -> Calibration:
    """Training samples without augmentation; others drawn from the same data are held out."""
    made: Calibration = calibration_of(task, seed, 1, samples)(model, prunable_parameters(model))
    return made


def example_of(task: Task, size: int = 16) -> dict[str, Tensor]:
    """Inputs without labels."""
    collate = task.collator or default_collate
    batch = collate([task.evaluation[i] for i in range(size)])
    return {key: batch[key] for key in batch if key != "labels"}


def seconds_of_a_pass(task: Task, samples: int) -> float:
    """CPU seconds of one forward and backward pass over the calibration data, in batches."""
    calibration = calibrated(task, copy.deepcopy(task.model), 0, samples)
    start = time.process_time()
    calibration.mean_gradient()
    return time.process_time() - start


def shrunk(task: Task, row: dict[str, Any], samples: int) -> nn.Module:
    """A copy of the dense model, shrunk as the row says; notes down how it went."""
    start = time.process_time()
    if row["method"] == "default":
        model = copy.deepcopy(task.model)
        report = _shrunk(task, model, row, calibrated(task, model, row["seed"], samples))
        row["flops"], row["left"] = _what_is_left(report)
    else:
        peer = _by_host if row["method"] in HOSTS else _by_formula
        model = peer(task, row, samples)
    row["seconds"] = time.process_time() - start
    return model


def _by_formula(task: Task, row: dict[str, Any], samples: int) -> nn.Module:
    """The best of three allocations of an importance of torch-pruning's on our groups."""
    found = []
    for allocation in ALLOCATIONS:
        model = copy.deepcopy(task.model)
        importance = PeerImportance(row["method"], calibrated(task, model, row["seed"], samples))
        how = "least_squares" if row["repair"] else "none"
        report = _shrunk(task, model, row, importance, allocation=allocation, repair=how)
        found.append((_held_out(task, model, row, samples), allocation, model, report))
    _, row["allocation"], model, report = min(found, key=lambda each: each[0])
    row["flops"], row["left"] = _what_is_left(report)
    return model


def _by_host(task: Task, row: dict[str, Any], samples: int) -> nn.Module:
    """The best of three settings of torch-pruning's own pruner."""
    found = []
    for scope in SCOPES:
        model, fraction = pruned_by_host(
            task.model,
            example_of(task),
            task.exclude,
            lambda copied: calibrated(task, copied, row["seed"], samples),
            method=row["method"],
            scope=scope,
            sparsity=row["sparsity"],
            repair=row["repair"],
            dimensions=row.get("heads") == "dimensions",
        )
        found.append((_held_out(task, model, row, samples), scope, model, fraction))
    _, row["allocation"], model, row["flops"] = min(found, key=lambda each: each[0])
    return model


def _shrunk(
    task: Task, model: nn.Module, row: dict[str, Any], importance: Any, **options: Any
) -> ShrinkReport:
    return shrink(
        model,
        example_of(task),
        importance,
        sparsity=row["sparsity"],
        target="flops",
        steps=row["steps"],
        ignored=list(task.exclude),
        heads=row.get("heads", "whole"),
        **options,
    )


def _held_out(task: Task, model: nn.Module, row: dict[str, Any], samples: int) -> float:
    return calibrated(task, model, row["seed"], samples).held_out_loss().value


def _what_is_left(report: ShrinkReport) -> tuple[float, dict[str, int]]:
    assert report.flops is not None
    return report.flops.sparsity, {group.name: group.units.after for group in report.groups}


def run(task: Task, output: Path, row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Fill a row in."""
    model = shrunk(task, row, arguments.samples)
    row["passes"] = row["seconds"] / seconds_of_a_pass(task, arguments.samples)
    trainer = trainer_for(task, model, output, row["seed"], task.updates, task.rate, None)
    row.update(measured(task, trainer))
    example = example_of(task)
    for size in (1, 16):
        part = {key: value[:size] for key, value in example.items()}
        row[f"latency_ratio_{size}"] = latency_ratio(task.model, model, part)
    if row["tuned"]:
        set_seed(row["seed"])
        trainer.train()
        row.update({f"tuned {key}": value for key, value in measured(task, trainer).items()})


def rows_for(arguments: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """What is to be run."""
    kinds = [
        ("default", True),
        *((name, how) for name in PEERS for how in map(bool, arguments.repair)),
    ]

    def heads(method: str) -> dict[str, str]:
        finer = arguments.heads or ("dimensions" if method == "default" else "whole")
        return {} if finer == "whole" or task in WITHOUT_HEADS else {"heads": finer}

    return [
        {
            "task": task,
            "seed": seed,
            "sparsity": sparsity,
            "method": method,
            "repair": repair,
            "steps": arguments.steps,
            "tuned": arguments.fine_tune,
            **heads(method),
        }
        for seed in arguments.seeds
        for sparsity in arguments.sparsities
        for method, repair in kinds
        if method in arguments.methods and (task in TRACED or method not in HOSTS)
    ]


def summary(file: Path) -> str:
    """The rows of a task as a Markdown table, means and deviations over seeds."""
    dense, *rows = json.loads(file.read_text())
    table = ResultsTable(
        [
            {"heads": "whole"} | {k: v for k, v in row.items() if k not in ("left", "allocation")}
            for row in rows
        ]
    )
    values = [key for key in SCORES if all(key in row for row in rows)]
    found = table.summarise(["sparsity", "method", "repair", "steps", "heads"], values)
    head = ", ".join(f"{key} {dense[key]:.4g}" for key in SCORES if key in dense)
    return f"dense: {head}\n\n{found.to_markdown()}"


def main() -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tasks", nargs="+", choices=list(TASKS))
    add("--data", type=Path, default=Path("../shared/data"))
    add("--output", type=Path, default=Path("results/structured"))
    add("--sparsities", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    add("--methods", nargs="+", choices=["default", *PEERS], default=["default", *PEERS])
    add("--repair", nargs="+", type=int, choices=[0, 1], default=[0, 1], help="of the peers")
    add("--heads", choices=["whole", "dimensions"], help="of attention, of peers too")
    add("--samples", type=int, default=512, help="of the calibration")
    add("--steps", type=int, default=1)
    add("--seeds", nargs="+", type=int, default=[0])
    add("--fine-tune", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.tasks:
        file = arguments.output / f"{name}.json"
        done = json.loads(file.read_text()) if file.is_file() else []
        set_seed(0)
        task = TASKS[name](arguments.data, arguments.output)
        dense = dense_model(task, arguments.output, name)
        done = [{"task": name, **dense}, *done[1:]]
        for row in rows_for(arguments, name):
            if any(row.items() <= other.items() for other in done):
                continue
            run(task, arguments.output, row, arguments)
            done.append(row)
            file.write_text(json.dumps(done, indent=1) + "\n")
            shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            print(shown, flush=True)
        print(summary(file), flush=True)


if __name__ == "__main__":
    main()
