"""Transformers pruned at once: what is recommended here beside SparseGPT, Wanda and magnitude.

    python -m tests.benchmarks.transformers wikitext minilm --scratch results/transformers

Every network is trained once and kept in the scratch folder. Copies of it are pruned with the same
calibration samples, measured, fine-tuned for a few updates with their masks kept, and measured
again. Seconds are CPU seconds of the pruning call, memory is what the process grew by at most while
it ran. ``--held-out`` measures on training samples that nothing else uses: settings are chosen
there. Rows are written as they come, and rows that are in the file are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.benchmarks.transformers_measures import compared, divergence, measured, short
from tests.benchmarks.transformers_tasks import TASKS, Data, Task, part_of
from torchprune_bayes import Calibration, keep_sparse, masks_of, prunable_parameters, prune_global
from torchprune_bayes.reports import ResultsTable

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "layer-magnitude": ("layer-magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {}),
    "alps": ("alps", {}),
    "opd": ("opd", {}),
    "kfac": ("kfac", {}),
    "woodfisher": ("woodfisher", {}),
    "layerwise": ("layerwise", {}),
    "layerwise, magnitude": ("layerwise", {"scores": "magnitude"}),
    "layerwise, opd": ("layerwise", {"scores": "opd"}),
    "layerwise, Kronecker": (
        "layerwise",
        {"scores": "opd", "score_options": {"structure": "kronecker"}},
    ),
    "layerwise, kfac": ("layerwise", {"scores": "kfac"}),
    "layerwise, damping 0.01": ("layerwise", {"score_options": {"damping": 0.01}}),
    "layerwise, 1 step": ("layerwise", {"steps": 1}),
    "layerwise, 8 steps": ("layerwise", {"steps": 8}),
    "layerwise, exact": ("layerwise", {"solver": "exact"}),
    "layerwise, sequential": ("layerwise", {"solver": "sequential"}),
}
DEFAULT = ["magnitude", "layer-magnitude", "wanda", "sparsegpt", "opd", "layerwise"]
SAVED_EVERY = 50  # updates of a dense training
UNCALIBRATED = ("magnitude", "layer-magnitude")
SCORES = ["nll", "perplexity", "accuracy", "tuned_nll", "tuned_perplexity", "tuned_accuracy"]


def main() -> None:
    """Run what is asked for and print the tables."""
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    for name in arguments.tasks:
        try:
            task = TASKS[name](arguments.data)
        except FileNotFoundError as error:
            print(f"{name}: skipped, there is no {error}")
            continue
        run(name, task, arguments)


def run(name: str, task: Task, arguments: argparse.Namespace) -> None:
    """All rows of one network."""
    file = arguments.scratch / f"{name}{'-held-out' if arguments.held_out else ''}.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    train_dense(name, task, arguments.scratch)
    reported = _reported(task, arguments)
    if not rows:
        print(name, "dense", short(measured(task.model, reported, arguments.samples)), flush=True)
    cells = [
        {"seed": seed, "sparsity": sparsity, "method": method}
        for seed in arguments.seeds
        for sparsity in arguments.sparsities
        for method in arguments.methods
        if not (":" in sparsity and METHODS[method][0] in UNCALIBRATED)
    ]
    for cell in cells:
        if any(cell.items() <= row.items() for row in rows):
            continue
        row = {**cell, **pruned(task, cell, reported, arguments)}
        print(short(row), flush=True)
        rows.append(row)
        file.write_text(json.dumps(rows, indent=1) + "\n")
    if rows:
        values = [key for key in [*SCORES, "divergence", "seconds", "mb"] if key in rows[0]]
        numbers = [{k: v for k, v in row.items() if k != "losses"} for row in rows]
        table = ResultsTable(numbers).summarise(["sparsity", "method"], values)
        print(table.to_markdown())
        print(*compared([row for row in rows if "losses" in row]), sep="\n")


def pruned(
    task: Task, cell: dict[str, Any], reported: Data, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Prune a copy; what came of it before and after fine-tuning."""
    model = copy.deepcopy(task.model).eval()
    params = prunable_parameters(model, exclude=[n for n in task.exclude if _has(model, n)])
    method, options = METHODS[cell["method"]]
    if method not in UNCALIBRATED:
        options = options | {"calibration": calibration_of(task, model, params, cell["seed"])}
    sparsity = cell["sparsity"]
    target = {"pattern": sparsity, "amount": None}
    target = target if ":" in sparsity else {"amount": float(sparsity)}
    before, start = _reset_peak(), time.process_time()
    prune_global(params, method, **target, **options)
    seconds = time.process_time() - start
    found: dict[str, Any] = {"seconds": seconds, "mb": _status("VmHWM") - before}
    found |= measured(model, reported, arguments.samples)
    if arguments.divergence:
        found["divergence"] = divergence(task.model, model, reported, arguments.samples)
    if arguments.finetune:
        finetune(task, model, cell["seed"])
        tuned = measured(model, reported, arguments.samples)
        found |= {f"tuned_{key}": value for key, value in tuned.items() if key != "losses"}
    return found


def calibration_of(task: Task, model: nn.Module, params: Any, seed: int) -> Calibration:
    """128 training samples, the same for all methods."""
    samples = len(task.train["labels"]) - task.held_out
    chosen = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[:128]
    data = [part_of(task.train, chosen)]
    return Calibration(model, data, params=params, num_samples=128, seed=seed)


def train_dense(name: str, task: Task, scratch: Path) -> None:
    """Train the network, go on with a training that was interrupted, or load it."""
    file = scratch / f"{name}.safetensors"
    if file.is_file():
        task.model.load_state_dict(load_file(file), strict=False)
        return
    optimizer = torch.optim.AdamW(task.model.parameters(), task.rate, weight_decay=0.1)
    partial = scratch / f"{name}-partial.pt"
    _train(task, task.model, optimizer, task.updates, task.rate, seed=0, partial=partial)
    save_file({k: v.clone() for k, v in task.model.state_dict().items()}, file)
    partial.unlink(missing_ok=True)


def finetune(task: Task, model: nn.Module, seed: int) -> None:
    """A few updates with the masks kept."""
    optimizer = torch.optim.AdamW(model.parameters(), task.finetuning_rate)
    named = dict(model.named_parameters())
    keep_sparse(optimizer, {named[f"{name}_orig"]: m for name, m in masks_of(model).items()})
    _train(task, model, optimizer, task.finetuning, task.finetuning_rate, seed)


def _train(
    task: Task,
    model: nn.Module,
    optimizer: Any,
    updates: int,
    rate: float,
    seed: int,
    partial: Path | None = None,
) -> None:
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, updates, pct_start=0.1)
    torch.manual_seed(seed)
    done, parts = 0, {"model": model, "optimizer": optimizer, "schedule": schedule}
    if partial is not None and partial.is_file():
        found = torch.load(partial, weights_only=True)
        done = found["done"]
        torch.set_rng_state(found["rng"])
        for key, part in parts.items():
            part.load_state_dict(found[key])
    model.train()
    for update, chosen in enumerate(_batches(task, updates, seed)):
        if update < done:
            continue
        optimizer.zero_grad()
        model(**part_of(task.train, chosen)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if partial is not None and (update + 1) % SAVED_EVERY == 0:
            state = {key: part.state_dict() for key, part in parts.items()}
            torch.save(state | {"done": update + 1, "rng": torch.get_rng_state()}, partial)
    model.eval()


def _batches(task: Task, updates: int, seed: int) -> Iterator[Tensor]:
    """Samples of each update, in another order in each epoch."""
    samples = len(task.train["labels"]) - task.held_out
    generator = torch.Generator().manual_seed(seed)
    left = updates
    while left:
        epoch = torch.randperm(samples, generator=generator).split(task.batch)[:left]
        yield from epoch
        left -= len(epoch)


def _reported(task: Task, arguments: argparse.Namespace) -> Data:
    return part_of(task.train, slice(-task.held_out, None)) if arguments.held_out else task.test


def _has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


def _reset_peak() -> float:
    """Begin to count the largest size of the process anew; its size now, in MiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status("VmHWM")
    return _status("VmRSS")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tasks", nargs="+", choices=TASKS)
    add("--data", type=Path, default=Path("../shared/data"), help="folder of data")
    add("--scratch", type=Path, default=Path("results/transformers"), help="networks and rows")
    add("--methods", nargs="+", choices=METHODS, default=DEFAULT)
    add("--sparsities", nargs="+", default=["0.7", "0.9", "2:4"], help="shares or N:M")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration")
    add("--samples", type=int, default=0, help="to measure with at most; 0 for all")
    add("--finetune", action=argparse.BooleanOptionalAction, default=True)
    add("--divergence", action="store_true", help="of the outputs from the dense network's, too")
    add("--held-out", action="store_true", help="measure on held-out training samples")
    return parser


if __name__ == "__main__":
    main()
