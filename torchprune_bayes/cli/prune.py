"""``torchprune-bayes prune``: one method on one model, saved for use without this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from torchprune_bayes._files import check_writable
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.cli._help import Parser, command_parser
from torchprune_bayes.cli._inputs import (
    add_model_options,
    add_running_options,
    add_sample_options,
    calibration_of,
    loaded,
)
from torchprune_bayes.cli._measuring import (
    Measured,
    energy_lines,
    energy_of,
    measure,
    metered,
    metric_lines,
    metrics_of,
)
from torchprune_bayes.cli._options import checked_options
from torchprune_bayes.cli._page import check_report, settings_of, write_page
from torchprune_bayes.cli._plan import Plan, Taken, estimate, in_words, watched
from torchprune_bayes.cli._results import count_pruned, save_pruned, write_config
from torchprune_bayes.cli._sources import Data
from torchprune_bayes.cli._text import is_text, save_tokenizer
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.methods import WoodFisher, find_method, prune_global
from torchprune_bayes.params import ParameterSpace, prunable_parameters
from torchprune_bayes.reports import LayerChange, ResultsTable

SUMMARY = "prune a model with one method and save it"
"""One line for the list of commands."""

_DESCRIPTION = """\
Prune the linear and convolution weights of a model with one method and save the result.

OUTPUT holds model.safetensors (plain weights with zeros: loads where this package is not
installed), masks.safetensors (one byte per weight, True keeps), report.json (sparsity of
each tensor, metrics before and after, what the method did, and this command), and config.yaml,
all options as they were, for --config. Hugging Face models are saved by save_pretrained, so
hf:OUTPUT loads them again.
"""

_EXAMPLES = """\
  # runs as it is: a small network on 8 x 8 digits
  torchprune-bayes prune --model torchprune_bayes.cli.digits:trained_network \\
      --data digits --method woodtaylor --amount 0.9 --options.steps 5

  # a published image model, on images in one folder per class
  torchprune-bayes prune --model timm:resnet18 --data imagenet/train \\
      --eval-data imagenet/val --method woodfisher --amount 0.8 --options.block_size 2000

  # a classifier of texts, on a table of texts and labels
  torchprune-bayes prune --model hf:FOLDER --data train.csv --eval-data dev.csv \\
      --text-column sentence --label-column label --method woodfisher --amount 0.8

  # all of this from a file, one value overridden
  torchprune-bayes prune --config pruned/config.yaml --amount 0.95 --output sparser

  # your own code: callables of a file in this folder
  torchprune-bayes prune --model my_project:make_model --checkpoint weights.safetensors \\
      --data my_project:make_loader --method magnitude --amount 0.9 --output sparse/

`torchprune-bayes methods NAME` lists what --options can set.
"""


def build_parser() -> Parser:
    """The parser of the subcommand."""
    parser = command_parser(
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    add_model_options(parser)
    _add_method_options(parser.add_argument_group("method"))
    add_running_options(parser, "pruned")
    return parser


def _add_method_options(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--method", required=True, metavar="NAME", help="see `torchprune-bayes methods`"
    )
    group.add_argument(
        "--amount",
        type=int | float,  # type: ignore[arg-type]  # jsonargparse takes any type
        metavar="A",
        help="fraction (0.9) or number (5000) of the weights to prune",
    )
    group.add_argument(
        "--options",
        type=dict,  # type: ignore[arg-type]
        default={},
        metavar="KEY=VALUE",
        help="options of the method, each as --options.KEY VALUE",
    )
    add_sample_options(group)


def run(arguments: argparse.Namespace) -> int:
    """Load, prune, measure, save; returns the exit code."""
    options = _method_options(arguments)
    check_report(arguments)
    torch.manual_seed(arguments.seed)
    model, data = loaded(arguments)
    space = ParameterSpace(model, prunable_parameters(model, exclude=arguments.exclude))
    if find_method(arguments.method).needs_calibration:
        options["calibration"] = _calibration(arguments, model, data, space)
    check_writable(arguments.output)
    plan = _printed_plan(arguments, space, options)
    before = None if data is None else measure(model, data.evaluation)
    with metered() as meter, watched(options.get("calibration"), space[0].leaf.device) as watch:
        decision = prune_global(space.pairs(), arguments.method, amount=arguments.amount, **options)
    after = None if data is None else measure(model, data.evaluation)
    evaluated_on = "" if data is None else data.evaluated_on
    report = {
        "command": arguments.command,
        "settings": settings_of(arguments),
        "seconds": watch.taken.seconds,
        **count_pruned(decision.masks),
        "metrics": metrics_of(before, after, evaluated_on),
        "info": decision.info,
        **_cost_of(plan, watch.taken),
        **energy_of(meter),
    }
    files = [*save_pruned(model, arguments.output, report), write_config(arguments)]
    if arguments.data is not None and is_text(arguments.data):
        save_tokenizer(model, arguments.output)
    lines = [_outcome(report)]
    if plan is not None:
        lines.append(plan.comparison(watch.taken))
    lines += [*energy_lines(meter), *metric_lines(before, after, evaluated_on)]
    if arguments.report:
        files.append(_write_page(arguments, report, before, after, lines))
    print("\n".join(lines))
    print("wrote", ", ".join(map(str, files)))
    return 0


def _write_page(
    arguments: argparse.Namespace,
    report: dict[str, Any],
    before: Measured | None,
    after: Measured | None,
    lines: list[str],
) -> Path:
    layers = [
        LayerChange(name, "weights", size, size - counts["pruned"])
        for name, counts in report["tensors"].items()
        for size in [prod(counts["shape"])]
    ]
    return write_page(
        arguments,
        f"{arguments.model} pruned by {arguments.method}",
        [line for line in lines if "->" not in line],
        models={"before": before, "after": after},
        tables=_steps(report["info"]),
        layers=layers,
    )


def _steps(info: dict[str, Any]) -> dict[str, ResultsTable]:
    """Plain numbers that a method reports for each of its steps."""
    plain = [
        {key: value for key, value in step.items() if isinstance(value, (str, int, float))}
        for step in info.get("steps", [])
    ]
    return {"Steps": ResultsTable(plain)} if any(plain) else {}


def _method_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = checked_options(arguments.method, arguments.options)
    method = cast("Callable[..., Any]", find_method(arguments.method).method)
    try:  # Before anything is loaded; PyTorch's own methods raise plain exceptions.
        method(arguments.amount, **options)
    except (TypeError, ValueError) as error:
        raise ArgumentError(str(error)) from error
    return options


def _calibration(
    arguments: argparse.Namespace, model: nn.Module, data: Data | None, space: ParameterSpace
) -> Calibration:
    if data is None:
        raise ArgumentTypeError(
            f"Expected --data for {arguments.method}, which uses gradients, got none."
        )
    return calibration_of(arguments, model, data, space.pairs())


def _printed_plan(
    arguments: argparse.Namespace, space: ParameterSpace, options: dict[str, Any]
) -> Plan | None:
    print(
        f"{arguments.method} on {type(space.model).__name__}: amount {arguments.amount} of "
        f"{space.numel:,} weights in {len(space)} tensors"
    )
    calibration = options.get("calibration")
    if calibration is None:
        print("plan: decided from the weights alone, no gradients")
        return None
    # WoodFisher and its relatives do; others need sums over gradients alone.
    keeps = issubclass(find_method(arguments.method).method, WoodFisher)
    plan = estimate(calibration, options.get("steps", 1), keeps_gradients=keeps)
    calibration.progress = sys.stderr.isatty()
    print("\n".join(plan.lines()))
    return plan


def _cost_of(plan: Plan | None, taken: Taken) -> dict[str, Any]:
    """An entry for the report, empty without a plan."""
    return {} if plan is None else {"cost": {"planned": asdict(plan), "taken": asdict(taken)}}


def _outcome(report: dict[str, Any]) -> str:
    return (
        f"pruned {report['pruned']:,} of {report['weights']:,} weights, sparsity "
        f"{report['sparsity']:.4f}, in {in_words(report['seconds'])}"
    )
