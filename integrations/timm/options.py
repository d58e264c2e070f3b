"""Command line of prune_timm.py: some of timm's own arguments, and those of pruning."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from torchprune_bayes import registered_methods
from torchprune_bayes.integrations.timm import importances_by_name

# Those of whole units need gates, or belong into `shrink`.
METHODS = sorted(name for name, entry in registered_methods().items() if not entry.is_structured)

RECOMMENDED = "recommended"
"""Gates' Fisher, measured loss curves and least squares, see ``shrink``."""


def parse(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    _add_model_and_data(parser)
    _add_training(parser)
    _add_pruning(parser.add_argument_group("pruning"))
    return parser.parse_args(argv)


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder of the data set; digits if neither is given")
    add("--dataset", default="", help="'' for ImageFolder, torch/NAME, hfds/NAME")
    add("--train-split", default="train")
    add("--val-split", default="validation")
    add("--class-map", default="")
    add("--input-key", help="column of the images in a Hugging Face data set")
    add("--target-key", help="column of the classes")
    add("--model", default="test_resnet", help="any name of timm.list_models()")
    add("--pretrained", action="store_true")
    add("--initial-checkpoint", default="")
    add("--num-classes", type=int, default=10)
    add("--img-size", type=int, default=32)
    add("--in-chans", type=int, help="channels that the model takes; images are converted")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs)


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-b", "--batch-size", type=int, default=64)
    add("-vb", "--validation-batch-size", type=int, default=256)
    add("-j", "--workers", type=int, default=0)
    add("--opt", default="adamw")
    add("--lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--momentum", type=float, default=0.9)
    add("--clip-grad", type=float)
    add("--sched", default="cosine")
    add("--epochs", type=int, default=6, help="epochs of training, pruning included")
    add("--warmup-epochs", type=int, default=0)
    add("--min-lr", type=float, default=0.0)
    add("--amp", action="store_true")
    add("--amp-dtype", default="bfloat16", choices=["float16", "bfloat16"])
    add("--channels-last", action="store_true")
    add("--model-ema", action="store_true")
    add("--model-ema-decay", type=float, default=0.99)
    add("--model-ema-warmup", action="store_true")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=42)
    add("--output", type=Path, default=Path("output/prune_timm"))
    add("--experiment", default="", help="sub-folder of --output; default model and method")
    add("--resume", action="store_true", help="go on from the experiment's last checkpoint")


def _add_pruning(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prune-method", default="magnitude", choices=METHODS)
    add("--prune-amount", type=float, default=0.8, help="sparsity to reach, of the whole")
    add("--prune-scope", default="global", choices=["global", "layer"])
    add("--prune-schedule", default="cubic", choices=["one_shot", "linear", "cubic", "geometric"])
    add("--prune-begin", type=float, default=2.0, help="epochs of training before pruning")
    add("--prune-end", type=float, default=4.0, help="epoch at which the sparsity is reached")
    add("--prune-steps", type=int, default=8, help="number of prunings")
    add("--prune-no-decay-after", action="store_true", help="no weight decay once that is reached")
    add("--prune-classifier", action="store_true", help="prune the classifier too")
    add("--prune-options", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    add("--prune-structured", action="store_true", help="remove channels and heads instead")
    names = [RECOMMENDED, *sorted(importances_by_name())]
    add("--prune-importance", default=RECOMMENDED, choices=names, help="with --prune-structured")
    add("--prune-target", default="params", choices=["channels", "params", "flops"])
    add("--calib-samples", type=int, default=512)
    add("--calib-batch-size", type=int, default=64)
