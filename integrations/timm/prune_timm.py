"""Prune or shrink any timm model, fine-tune it, validate and save it.

The arguments are a part of those of timm's train.py, listed in the README beside this file; those
of pruning start with --prune and --calib. Without a data set it takes scikit-learn's digits and
runs offline in a few minutes:

    python integrations/timm/prune_timm.py --model test_resnet --prune-method woodfisher
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from digits_folder import write_digits
from options import RECOMMENDED, parse
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, NativeScaler, random_seed, update_summary
from torch import nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration, GradualPruner, prunable_parameters
from torchprune_bayes import schedules as laws
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations.resume import ResumableShrink, load_training, save_training
from torchprune_bayes.integrations.timm import (
    WithChannels,
    calibrate,
    classifier_names,
    data_config,
    hold_zeros,
    importance_of,
    save_pruned,
)
from torchprune_bayes.reports import evaluate
from torchprune_bayes.structured import check_shrinkable

logger = logging.getLogger("prune")


class Run:
    """One experiment: model, data, optimizer, pruner."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        name = args.experiment or f"{args.model}-{self._method_name()}-{args.prune_amount}"
        self.folder = args.output / name
        self.folder.mkdir(parents=True, exist_ok=True)
        if args.data_dir is None and not args.dataset:
            args.data_dir = write_digits(args.output / "digits")
        random_seed(args.seed)
        self.kwargs = {"num_classes": args.num_classes, **args.model_kwargs}
        if args.in_chans is not None:
            self.kwargs["in_chans"] = args.in_chans
        self.model: nn.Module = timm.create_model(
            args.model,
            pretrained=args.pretrained,
            checkpoint_path=args.initial_checkpoint,
            **self.kwargs,
        )
        form = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model.to(args.device, memory_format=form)
        self.config = data_config(self.model, img_size=args.img_size)
        self.train_loader = self._loader(args.train_split, args.batch_size, training=True)
        self.val_loader = self._loader(args.val_split, args.validation_batch_size, training=False)
        self.optimizer = create_optimizer_v2(self.model, **optimizer_kwargs(args))
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(args), updates_per_epoch=len(self.train_loader)
        )
        self.scaler = NativeScaler(device=args.device) if args.amp_dtype == "float16" else None
        self.ema = self._average() if args.model_ema else None
        self.schedule = self._schedule()
        self._check_time()
        self.pruner = None if args.prune_structured else self._new_pruner()
        averages = () if self.ema is None else (self.ema.module,)
        self.shrinking = ResumableShrink(self.model, optimizer=self.optimizer, ema=averages)
        if args.prune_structured:
            check_shrinkable(self.model, self._example(), sparsity=args.prune_amount, **self._units)

    def _method_name(self) -> str:
        args = self.args
        return str(args.prune_importance if args.prune_structured else args.prune_method)

    def _average(self) -> ModelEmaV3:
        args = self.args
        return ModelEmaV3(self.model, args.model_ema_decay, use_warmup=args.model_ema_warmup)

    def _dataset(self, split: str, *, training: bool) -> Any:
        args = self.args
        return create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=training,
            class_map=args.class_map,
            input_key=args.input_key,
            target_key=args.target_key,
            batch_size=args.batch_size,
            seed=args.seed,
        )

    def _loader(self, split: str, batch_size: int, *, training: bool) -> Any:
        dataset = self._dataset(split, training=training)
        loader = create_loader(
            dataset,
            input_size=self.config["input_size"],
            batch_size=batch_size,
            is_training=training,
            hflip=0.0,
            color_jitter=0.0,
            scale=(0.8, 1.0),
            interpolation=self.config["interpolation"],
            mean=self.config["mean"],
            std=self.config["std"],
            crop_pct=self.config["crop_pct"],
            num_workers=self.args.workers,
            persistent_workers=self.args.workers > 0,
            use_prefetcher=False,
        )
        dataset.transform = WithChannels(dataset.transform, self.config["input_size"][0])
        return loader

    def calibration(self) -> Calibration:
        """Gradients from training images, prepared as for evaluation."""
        exclude = [] if self.args.prune_classifier else classifier_names(self.model)
        return calibrate(
            self.model,
            self._dataset(self.args.train_split, training=False),
            params=prunable_parameters(self.model, exclude=exclude),
            num_samples=self.args.calib_samples,
            batch_size=self.args.calib_batch_size,
            workers=self.args.workers,
            data_config=self.config,
            seed=self.args.seed,
        )

    def _schedule(self) -> laws.Schedule:
        """Sparsity of the whole after each update."""
        args = self.args
        first, last = (
            round(e * len(self.train_loader)) for e in (args.prune_begin, args.prune_end)
        )
        if args.prune_schedule == "one_shot":
            return laws.one_shot(args.prune_amount, at=first)
        law: Callable[..., laws.Schedule] = getattr(laws, args.prune_schedule)
        return law(args.prune_amount, first, last, times=args.prune_steps)

    def _check_time(self) -> None:
        """Say before the training whether it is long enough to prune."""
        args, updates = self.args, self.args.epochs * len(self.train_loader)
        reached = self.schedule(updates)
        if updates and not reached:
            raise ArgumentError(
                f"Expected pruning within the {args.epochs} epochs of the training, got "
                f"--prune-begin {args.prune_begin:g}: begin earlier, or train longer."
            )
        if updates and reached < self.schedule.final:
            logger.warning("The training ends before --prune-end, at a sparsity of %.3f.", reached)

    def _new_pruner(self) -> GradualPruner:
        args = self.args
        options = dict(args.prune_options)
        if args.prune_scope != "global":
            options["scope"] = args.prune_scope
        return GradualPruner(
            None,
            args.prune_method,
            self.schedule,
            calibration=self.calibration(),
            optimizer=self.optimizer,
            decay_after=not args.prune_no_decay_after,
            **options,
        )

    def _example(self) -> torch.Tensor:
        return torch.zeros(1, *self.config["input_size"], device=self.args.device)

    @property
    def _units(self) -> dict[str, Any]:
        """What a sparsity counts, and what is left whole."""
        ignored = [] if self.args.prune_classifier else classifier_names(self.model)
        return {"target": self.args.prune_target, "ignored": ignored}

    def _importance(self) -> Any:
        calibration = self.calibration()
        if self.args.prune_importance == RECOMMENDED:
            return calibration
        return importance_of(self.args.prune_importance, calibration)

    def shrink(self, update: int) -> None:
        """Remove channels or heads if it is due, with the optimizer's state and the average."""
        if not self.args.prune_structured or not self.schedule.is_due(update):
            return
        sparsity = self.schedule(update)
        report = self.shrinking.shrink_to(
            sparsity, self._example(), self._importance, **self._units
        )
        if report is not None:
            logger.info("shrunk to a sparsity of %.4f at update %d\n%s", sparsity, update, report)

    def train_one_epoch(self, epoch: int) -> float:
        """Train and prune for an epoch; returns the mean loss."""
        self.model.train()
        total, updates = 0.0, epoch * len(self.train_loader)
        for index, (images, target) in enumerate(self.train_loader):
            loss = self._update(images.to(self.args.device), target.to(self.args.device))
            event = self.pruner.step() if self.pruner is not None else None
            if event is not None:
                logger.info("pruned to %.4f at update %d", event["sparsity"], event["step"])
            if self.ema is not None:
                self.ema.update(self.model, step=updates + index)
                if event is not None and self.pruner is not None:
                    hold_zeros(self.ema, self.pruner.masks)
            self.shrink(updates + index + 1)
            self.scheduler.step_update(updates + index + 1)
            total += loss
        self.scheduler.step(epoch + 1)
        return total / len(self.train_loader)

    def _update(self, images: torch.Tensor, target: torch.Tensor) -> float:
        args = self.args
        dtype = getattr(torch, args.amp_dtype)
        with torch.autocast(args.device, dtype) if args.amp else nullcontext():
            loss = cross_entropy(self.model(images), target)
        self.optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, args.clip_grad, parameters=self.model.parameters())
        else:
            loss.backward()
            if args.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
            self.optimizer.step()
        return float(loss.detach())

    def validate(self) -> dict[str, float]:
        """Accuracies in percent, negative log-likelihood, calibration error, sparsity."""
        model = self.model if self.ema is None else self.ema.module
        found = evaluate(model, self.val_loader, device=self.args.device)
        sparsity = 0.0 if self.pruner is None else self.pruner.sparsity
        return {
            "top1": 100 * found.accuracy,
            "top5": 100 * found.top5,
            "loss": found.nll,
            "ece": found.ece,
            "sparsity": sparsity,
            "params": sum(p.numel() for p in model.parameters()),
        }

    def run(self) -> dict[str, float]:
        """Train, prune, validate, save after each epoch; returns the last metrics."""
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        (self.folder / "args.yaml").write_text(yaml.safe_dump(plain))
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        parts |= {"shrinking": self.shrinking} if self.args.prune_structured else {}
        parts |= {"pruner": self.pruner} if self.pruner is not None else {}
        parts |= {"ema": self.ema} if self.ema is not None else {}
        last = self.folder / "last.pt"
        begin = load_training(last, **parts) if self.args.resume else 0
        self.scheduler.step(begin)
        metrics = {} if begin < self.args.epochs else self.validate()
        for epoch in range(begin, self.args.epochs):
            if epoch == 0:
                self.shrink(0)
            loss = self.train_one_epoch(epoch)
            metrics = self.validate()
            logger.info("epoch %d: %s", epoch, metrics)
            table = self.folder / "summary.csv"
            update_summary(epoch, {"loss": loss}, metrics, table, write_header=not table.exists())
            save_training(last, step=epoch + 1, **parts)
        save_pruned(
            self.model if self.ema is None else self.ema.module,
            self.folder,
            architecture=self.args.model,
            model_kwargs=self.kwargs,
            shrunk=self.args.prune_structured,
            method=self._method_name(),
            metrics=metrics,
        )
        return metrics


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Run(parse(__doc__, argv))
    metrics = run.run()
    logger.info("saved in %s", run.folder)
    return metrics


if __name__ == "__main__":
    main()
