"""Pruning trained networks with a short fine-tuning: every method from the same dense checkpoint.

    python -m tests.benchmarks.finetuned distilbert gpt2 vit resnet20 --data ../shared/data

Each task trains a dense network once (the file is kept beside the results) and prunes copies of it
by ``PruningCallback`` or ``ShrinkingCallback`` while a Trainer fine-tunes them, all methods with
the same schedule, updates, learning rate and order of the data. Reported are accuracy in percent,
negative log-likelihood (for the language model also its exponential), calibration error, and the
CPU seconds of pruning and fine-tuning together; for shrunk networks also the latency of the dense
one over theirs in CPU seconds of one thread, the median of alternating pairs. Rows are written as
they come; what is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments, set_seed

from tests.benchmarks.finetuned_tasks import TASKS, Images, Task
from torchprune_bayes import cubic, one_shot, prunable_parameters
from torchprune_bayes.integrations.hf import PruningCallback, ShrinkingCallback, calibrate_on
from torchprune_bayes.integrations.timm import importance_of
from torchprune_bayes.reports import ResultsTable

GRADIENTS = 256
BLOCK = 2 * GRADIENTS
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "woodfisher": {"block_size": BLOCK},
    "woodtaylor": {"block_size": BLOCK},
    "cbs": {"block_size": BLOCK, "initial": "woodfisher", "max_iterations": 10},
    "opd": {},
}
IMPORTANCES = ("l1filter", "snapit", "opd", "woodfisher")
PAIRS = 15
SCORES = ["accuracy", "perplexity", "nll", "ece", "seconds"]
SCORES += ["parameter_ratio", "latency_ratio_1", "latency_ratio_16"]


def trainer_for(
    task: Task, model: nn.Module, output: Path, seed: int, updates: int, rate: float, callback: Any
) -> Trainer:
    """A Trainer that writes no checkpoints."""
    settings = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=updates,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=4 * task.batch_size,
        learning_rate=rate,
        optim=task.optimizer,
        optim_args="momentum=0.9" if task.optimizer == "sgd" else None,
        weight_decay=1e-4 if task.optimizer == "sgd" else 0.01,
        warmup_steps=updates // 10,
        use_cpu=True,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_strategy="no",
        batch_eval_metrics=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=model,
        args=settings,
        train_dataset=task.train,
        eval_dataset=task.evaluation,
        data_collator=task.collator,
        compute_metrics=PruningCallback("magnitude", one_shot(0.0)).metrics(causal=task.causal),
        callbacks=[callback] if callback is not None else [],
    )


def measured(task: Task, trainer: Trainer) -> dict[str, float]:
    """Accuracy, likelihood and calibration on the evaluation data.

    ``perplexity`` is per predicted token. ``eval_loss_perplexity`` is that of the Trainer's
    ``eval_loss``, which is lower: it divides a block's 63 losses by its 64 labels.
    """
    found = trainer.evaluate()
    row = {"accuracy": 100 * found["eval_accuracy"], "nll": found["eval_nll"]}
    row["ece"] = found["eval_ece"]
    if task.causal:
        row["perplexity"] = math.exp(found["eval_nll"])
        row["eval_loss_perplexity"] = math.exp(found["eval_loss"])
    return row


def calibration_of(task: Task, seed: int, mini_batch: int, gradients: int) -> Any:
    """Training data, without augmentation."""
    return calibrate_on(
        task.train.plain() if isinstance(task.train, Images) else task.train,
        num_samples=gradients * mini_batch,
        mini_batch=mini_batch,
        collator=task.collator,
        batch_size=64,
        seed=seed,
        memory_mb=3072,
    )


def dense_model(task: Task, output: Path, name: str) -> dict[str, float]:
    """Train the task's model, or load it; returns its metrics."""
    file = output / f"{name}.safetensors"
    trainer = trainer_for(task, task.model, output, 0, task.dense_updates, task.dense_rate, None)
    if file.is_file():
        task.model.load_state_dict(load_file(file), strict=False)
    elif task.dense_updates:
        trainer.train()
        save_file({k: v.clone() for k, v in task.model.state_dict().items()}, file)
    return measured(task, trainer)


def pruned(task: Task, output: Path, arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    """Prune weights while the copy is fine-tuned; fills in the row."""
    sparsity, seed = row["sparsity"], row["seed"]
    schedule = one_shot(sparsity)
    if row["prunings"] > 1:
        end = task.updates // 2
        schedule = cubic(sparsity, 0, end, end // (row["prunings"] - 1))
    callback = PruningCallback(
        row["method"],
        schedule,
        exclude=task.exclude,
        calibration=calibration_of(task, seed, task.mini_batch, arguments.gradients),
        **METHODS[row["method"]],
    )
    _finetune(task, output, seed, callback, row)
    assert callback.pruner is not None
    row["info"] = [str(event["info"])[:300] for event in callback.pruner.history]
    row["reached"] = callback.sparsity


def shrunk(task: Task, output: Path, arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    """Remove units before the copy is fine-tuned; fills in the row."""
    seed = row["seed"]
    collate = task.collator or default_collate
    batch = collate([task.evaluation[i] for i in range(16)])
    example = {key: batch[key] for key in batch if key != "labels"}

    def importance(model: nn.Module) -> Any:
        make = calibration_of(task, seed, 1, 4 * arguments.gradients)
        return importance_of(row["method"], make(model, prunable_parameters(model)))

    callback = ShrinkingCallback(
        importance, example, sparsity=row["sparsity"], target="flops", ignored=list(task.exclude)
    )
    model = _finetune(task, output, seed, callback, row)
    assert callback.report is not None
    amounts = callback.report.parameters
    row["parameter_ratio"] = amounts.before / amounts.after
    for size in (1, 16):
        part = {key: value[:size] for key, value in example.items()}
        row[f"latency_ratio_{size}"] = latency_ratio(task.model, model, part)


def _finetune(task: Task, output: Path, seed: int, callback: Any, row: dict[str, Any]) -> nn.Module:
    model = copy.deepcopy(task.model)
    set_seed(seed)
    trainer = trainer_for(task, model, output, seed, task.updates, task.rate, callback)
    start = time.process_time()
    trainer.train()
    row["seconds"] = time.process_time() - start
    row.update(measured(task, trainer))
    return model


@torch.inference_mode()
def latency_ratio(dense: nn.Module, small: nn.Module, inputs: dict[str, Any]) -> float:
    """Median over alternating pairs of the CPU seconds of one over those of the other.

    With one thread these are the latency of a processor that nothing else runs on.
    """
    models = (dense.eval(), small.eval())
    ratios = []
    for _ in range(PAIRS + 2):
        times = []
        for model in models:
            start = time.process_time()
            model(**inputs)
            times.append(time.process_time() - start)
        ratios.append(times[0] / times[1])
    return median(ratios[2:])


def rows_for(arguments: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """What is to be run, seed by seed."""
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        common = {"task": task, "seed": seed}
        rows += [
            {**common, "kind": "weights", "method": m, "sparsity": s, "prunings": p}
            for p in arguments.prunings
            for s in arguments.sparsities
            for m in arguments.methods
        ]
        rows += [
            {**common, "kind": "units", "method": m, "sparsity": s}
            for s in arguments.unit_sparsities
            for m in arguments.importances
        ]
    return rows


def summary(file: Path) -> str:
    """The rows of a task as Markdown tables, means over seeds."""
    rows = json.loads(file.read_text())
    tables = [
        f"dense: {', '.join(f'{key} {rows[0][key]:.4g}' for key in SCORES if key in rows[0])}"
    ]
    for kind, by in (("weights", ["sparsity", "prunings"]), ("units", ["sparsity"])):
        chosen = [{k: v for k, v in r.items() if k != "info"} for r in rows if r["kind"] == kind]
        if chosen:
            values = [key for key in SCORES if key in chosen[0]]
            found = ResultsTable(chosen).summarise(["method", *by], values)
            tables.append(found.to_markdown())
    return "\n\n".join(tables)


def main() -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tasks", nargs="+", choices=list(TASKS))
    add("--data", type=Path, default=Path("../shared/data"))
    add("--output", type=Path, default=Path("results/finetuned"))
    add("--methods", nargs="*", choices=list(METHODS), default=["magnitude", "woodfisher", "cbs"])
    add("--sparsities", nargs="*", type=float, default=[0.8, 0.9, 0.95])
    add("--prunings", nargs="*", type=int, default=[1], help="steps of the schedule; 1 is one shot")
    add("--importances", nargs="*", choices=IMPORTANCES, default=["l1filter", "snapit"])
    add("--unit-sparsities", nargs="*", type=float, default=[0.5, 0.7])
    add("--gradients", type=int, default=GRADIENTS, help="gradients of a calibration")
    add("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.tasks:
        _run_task(arguments, name)
        print(summary(arguments.output / f"{name}.json"), flush=True)


def _run_task(arguments: argparse.Namespace, name: str) -> None:
    file = arguments.output / f"{name}.json"
    done = json.loads(file.read_text()) if file.is_file() else []
    set_seed(0)
    task = TASKS[name](arguments.data, arguments.output)
    row: dict[str, Any] = {
        "task": name,
        "kind": "dense",
        **dense_model(task, arguments.output, name),
    }
    print(row, flush=True)
    done = [row, *(r for r in done if r["kind"] != "dense")]
    file.write_text(json.dumps(done, indent=1) + "\n")
    for row in rows_for(arguments, name):
        if any(row.items() <= other.items() for other in done):
            continue
        run = pruned if row["kind"] == "weights" else shrunk
        run(task, arguments.output, arguments, row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        done.append(row)
        file.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
