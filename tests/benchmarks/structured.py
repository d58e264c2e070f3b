"""Shrinking without and with repair: the recommended call against torch-pruning's importances.

    python -m tests.benchmarks.structured gpt2 vit resnet20 --data ../shared/data

The dense networks are those of ``finetuned.py``; each is trained once and kept in ``--output``. At
every fraction of the FLOPs a copy is shrunk and measured at once; with ``--fine-tune`` it is then
trained like all others, for the same few updates, and measured again.

``default`` is ``shrink(model, inputs, calibration, ...)``. The others are torch-pruning's group
importances at their default settings (mean over the layers of a group, divided by the mean of the
group's units), written for groups of any model, so that transformers are served as well. Each is
ranked globally, within layers and within isomorphic groups, the best of which is chosen by the loss
on training samples that are not calibrated on, and each is run without and with the repair. The
test split is measured and nothing is chosen on it. CPU seconds are those of scoring, ranking,
repairing and choosing. Rows are written as they come; what is in the file is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
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
from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes._numerics.joint_cost import sums_of_units
from torchprune_bayes.reports import ResultsTable
from torchprune_bayes.structured import ShrinkReport, UnitImportance, shrink
from torchprune_bayes.structured._space import space_of
from torchprune_bayes.structured.allocation import Allocation
from torchprune_bayes.structured.groups import UnitGroup

ALLOCATIONS: tuple[Allocation, ...] = ("global", "layer", "isomorphic")
PEERS = ("magnitude", "taylor", "hessian")
SCORES = ["perplexity", "accuracy", "nll", "tuned perplexity", "tuned accuracy", "seconds"]
SCORES += ["latency_ratio_1", "latency_ratio_16"]


class PeerImportance(UnitImportance):
    """An importance of torch-pruning's by its formula, on the groups of this library.

    ``"magnitude"`` sums ``w²``, ``"taylor"`` ``|w g|`` with the gradient of the mean loss, and
    ``"hessian"`` ``w² mean_n g_n²``; over the weights of a unit in each layer, then the mean over
    layers, then divided by the mean of the group.
    """

    needs_recalibration = True

    def __init__(self, kind: str, calibration: Calibration) -> None:
        self.kind, self.calibration = kind, calibration
        self._entries: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Take what each weight counts."""
        weights = [p for g in groups for p in g.slices if p.name.endswith("weight")]
        space, self._names = space_of(model, weights)
        calibration = self.calibration.with_space(space)
        values = space.values()
        if self.kind == "magnitude":
            self._entries = {name: value.square() for name, value in values.items()}
        elif self.kind == "taylor":
            found = calibration.mean_gradient()
            self._entries = {name: (value * found[name]).abs() for name, value in values.items()}
        else:
            squares = sum(rows.square().sum(0) for rows in calibration.gradients())
            assert isinstance(squares, Tensor)
            parts = squares.split([value.numel() for value in values.values()])
            self._entries = {
                name: value.square() * part.view_as(value) / calibration.num_gradients
                for (name, value), part in zip(values.items(), parts, strict=True)
            }

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Mean over the layers of a group, relative to the mean of its units."""
        pieces = [piece for piece in group.slices if piece.name in self._names]
        local = [
            sums_of_units(self._entries[self._names[p.name]].unsqueeze(0), [(p.dim, p.positions)])
            for p in pieces
        ]
        if not local:
            return None
        found = torch.stack(local).mean(0)[0].double()
        return found / found.mean()


def calibrated(task: Task, model: nn.Module, seed: int, samples: int) -> Calibration:
    """Training samples without augmentation; others drawn from the same data are held out."""
    made: Calibration = calibration_of(task, seed, 1, samples)(model, prunable_parameters(model))
    return made


def example_of(task: Task, size: int = 16) -> dict[str, Tensor]:
    """Inputs without labels."""
    collate = task.collator or default_collate
    batch = collate([task.evaluation[i] for i in range(size)])
    return {key: batch[key] for key in batch if key != "labels"}


def shrunk(task: Task, row: dict[str, Any], samples: int) -> tuple[nn.Module, ShrinkReport]:
    """A copy of the dense model, shrunk as the row says; notes allocation and seconds down."""
    example, options = example_of(task), {"sparsity": row["sparsity"], "target": "flops"}
    options["ignored"] = list(task.exclude)
    start = time.process_time()
    if row["method"] == "default":
        model = copy.deepcopy(task.model)
        calibration = calibrated(task, model, row["seed"], samples)
        report = shrink(model, example, calibration, **options, steps=row["steps"])
        row["seconds"] = time.process_time() - start
        return model, report
    found = []
    for allocation in ALLOCATIONS:
        model = copy.deepcopy(task.model)
        calibration = calibrated(task, model, row["seed"], samples)
        report = shrink(
            model,
            example,
            PeerImportance(row["method"], calibration),
            **options,
            allocation=allocation,
            repair="least_squares" if row["repair"] else "none",
        )
        calibration = calibrated(task, model, row["seed"], samples)
        loss = calibration.held_out_loss().value
        found.append((loss, allocation, model, report))
    row["seconds"] = time.process_time() - start
    _, row["allocation"], model, report = min(found, key=lambda each: each[0])
    return model, report


def run(task: Task, output: Path, row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Fill a row in."""
    model, report = shrunk(task, row, arguments.samples)
    assert report.flops is not None
    row["flops"] = report.flops.sparsity
    row["left"] = {group.name: group.units.after for group in report.groups}
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
    kinds = [("default", True), *((name, how) for name in PEERS for how in (False, True))]
    return [
        {
            "task": task,
            "seed": seed,
            "sparsity": sparsity,
            "method": method,
            "repair": repair,
            "steps": arguments.steps,
            "tuned": arguments.fine_tune,
        }
        for seed in arguments.seeds
        for sparsity in arguments.sparsities
        for method, repair in kinds
        if method in arguments.methods
    ]


def summary(file: Path) -> str:
    """The rows of a task as a Markdown table, means and deviations over seeds."""
    dense, *rows = json.loads(file.read_text())
    table = ResultsTable(
        [{k: v for k, v in row.items() if k not in ("left", "allocation")} for row in rows]
    )
    values = [key for key in SCORES if all(key in row for row in rows)]
    found = table.summarise(["sparsity", "method", "repair", "steps"], values)
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
