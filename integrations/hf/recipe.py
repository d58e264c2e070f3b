"""What the recipes share: options of training and pruning, the Trainer, the results."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from torchprune_bayes import registered_methods
from torchprune_bayes import schedules as laws
from torchprune_bayes.integrations.hf import (
    DistillationTrainer,
    PruningCallback,
    calibrate_on,
    last_whole_checkpoint,
)
from torchprune_bayes.schedules import Schedule

# Those of whole units need gates, or belong into `shrink`.
METHODS = sorted(name for name, entry in registered_methods().items() if not entry.is_structured)


def parser(description: str | None, *, lr: float, epochs: float) -> argparse.ArgumentParser:
    """A parser with the options that all recipes have."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = found.add_argument
    add("--data", type=Path, help="local folder; default: data that comes with Python")
    add("--model", help="folder or Hub name of a trained model; default: a small one from scratch")
    add("--output", type=Path, default=Path("output/hf"))
    add("--epochs", type=float, default=epochs)
    add("--max-steps", type=int, default=-1)
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=lr)
    add("--seed", type=int, default=0)
    add("--max-samples", type=int, help="use only so many samples for training and evaluation")
    add("--bf16", action="store_true")
    add("--resume", action="store_true", help="go on from the last whole checkpoint in --output")
    group = found.add_argument_group("pruning")
    add = group.add_argument
    add("--method", choices=METHODS, help="layerwise for a trained --model, otherwise magnitude")
    add("--sparsity", type=float, default=0.8, help="0 trains the dense model")
    add("--schedule", default="cubic", choices=["linear", "cubic", "geometric"])
    add("--prune-begin", type=float, default=0.3, help="share of the training before pruning")
    add("--prune-end", type=float, default=0.7, help="share at which the sparsity is reached")
    add("--prune-steps", type=int, default=8, help="number of prunings")
    add("--no-decay-after", action="store_true", help="no weight decay once that is reached")
    add("--calibration-samples", type=int, default=256)
    add("--mini-batch", type=int, default=4, help="calibration samples averaged into a gradient")
    add("--distill", action="store_true", help="also learn from --model as it was before pruning")
    return found


def schedule_of(args: argparse.Namespace) -> Callable[[int], Schedule]:
    """The schedule, once the number of updates is known."""

    def make(steps: int) -> Schedule:
        begin, end = round(args.prune_begin * steps), round(args.prune_end * steps)
        law: Callable[..., Schedule] = getattr(laws, args.schedule)
        return law(args.sparsity, begin, end, times=args.prune_steps)

    return make


def run(
    args: argparse.Namespace,
    model: PreTrainedModel,
    train: Any,
    evaluation: Any,
    *,
    exclude: Sequence[str] = (),
    collator: Any = None,
    causal: bool = False,
    tokenizer: Any = None,
) -> dict[str, float]:
    """Train, prune, evaluate, save; returns and writes the metrics."""
    args.method = args.method or ("layerwise" if args.model else "magnitude")
    calibration = calibrate_on(
        train,
        num_samples=args.calibration_samples,
        collator=collator,
        mini_batch=args.mini_batch,
        seed=args.seed,
    )
    pruning = PruningCallback(
        args.method,
        schedule_of(args),
        exclude=exclude,
        calibration=calibration,
        decay_after=not args.no_decay_after,
    )
    kind: type[Trainer] = DistillationTrainer if args.distill else Trainer
    trainer = kind(
        model=model,
        args=_settings(args),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator,
        compute_metrics=pruning.metrics(causal=causal),
        callbacks=[pruning],
    )
    trainer.train(
        resume_from_checkpoint=last_whole_checkpoint(args.output) if args.resume else None
    )
    found = {key: value for key, value in trainer.evaluate().items() if "per_second" not in key}
    if causal:
        found["eval_perplexity"] = math.exp(found["eval_nll"])
    trainer.save_model(str(args.output / "model"))
    if trainer.is_world_process_zero():
        if tokenizer is not None:
            tokenizer.save_pretrained(args.output / "model")
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        content = {
            "settings": settings,
            "processes": trainer.accelerator.num_processes,
            "metrics": found,
        }
        text = json.dumps(content, indent=2)
        (args.output / "results.json").write_text(text + "\n", encoding="utf-8")
        print({key: round(value, 4) for key, value in found.items()})
    return found


def _settings(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.01,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
        eval_strategy="no",
        save_strategy="steps",
        save_steps=0.25,
        save_total_limit=2,
        logging_steps=0.1,
        batch_eval_metrics=True,
        # Otherwise the loss of models that average over samples is multiplied by the processes.
        average_tokens_across_devices=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
