"""``torchprune-bayes evaluate``: a model and its pruned versions, side by side."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprune_bayes._checks import check_count
from torchprune_bayes._extras import require
from torchprune_bayes._files import check_writable
from torchprune_bayes.cli._help import Parser, command_parser
from torchprune_bayes.cli._inputs import (
    add_model_options,
    add_running_options,
    example_of,
    loaded,
)
from torchprune_bayes.cli._measuring import Measured, measure
from torchprune_bayes.cli._page import Drawing, check_report, write_page
from torchprune_bayes.cli._results import write_config
from torchprune_bayes.cli._sources import Data, load_checkpoint, normalisation_of
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.reports import ResultsTable, compare_speed, evaluate_attacked, plot_attacked
from torchprune_bayes.reports.robustness import ATTACKS

SUMMARY = "measure a model and what pruning left of it side by side, under attacks too"
"""One line for the list of commands."""

_DESCRIPTION = """\
Measure a model, and folders that prune and shrink made of it: metrics, size, time of a forward
pass and, with --attack, accuracy under adversarial attacks (needs foolbox, the extra `attacks`).

OUTPUT holds evaluate.json and evaluate.csv, a row for each model; with --attack attacked.json
and attacked.csv, a row for each model and strength; and config.yaml, for --config.
"""

_EXAMPLES = """\
  # runs as it is, after the first examples of prune and shrink
  torchprune-bayes evaluate --model torchprune_bayes.cli.digits:trained_network \\
      --data digits --pruned pruned shrunk --attack pgd --epsilons 0.02 0.05 0.1 --report

  # a published image model and what is left of it
  torchprune-bayes evaluate --model timm:resnet18 --data imagenet/val \\
      --pruned pruned shrunk --attack fgsm
"""

_DENSE = "dense"


def build_parser() -> Parser:
    """The parser of the subcommand."""
    parser = command_parser(description=_DESCRIPTION, examples=_EXAMPLES)
    add_model_options(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--pruned",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="what prune or shrink saved of this model",
    )
    group.add_argument("--attack", choices=list(ATTACKS), help="attack of foolbox, if any")
    group.add_argument(
        "--epsilons",
        nargs="+",
        type=float,
        default=[0.01, 0.03, 0.1],
        metavar="E",
        help="strengths of the attack, in units of the pixels",
    )
    group.add_argument(
        "--bounds",
        nargs=2,
        type=float,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="smallest and largest value of a pixel",
    )
    group.add_argument(
        "--num-samples", type=int, default=256, metavar="N", help="samples to attack"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random starts")
    add_running_options(parser, "evaluated", gradients=False)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Load, measure, write; returns the exit code."""
    _check(arguments)
    torch.manual_seed(arguments.seed)
    model, data = loaded(arguments)
    if data is None:
        raise ArgumentTypeError("Expected --data to measure with, got none.")
    models = {_DENSE: model} | {str(path): _of(model, path) for path in arguments.pruned}
    check_writable(arguments.output)
    measured = {name: measure(one, data.evaluation) for name, one in models.items()}
    rows = ResultsTable(_row(name, models, measured[name], data) for name in models)
    attacked = _attacked(arguments, models, data) if arguments.attack else ResultsTable()
    files = _write(arguments, rows, attacked, measured)
    print(rows)
    if len(attacked):
        print(f"\nunder attack, {next(iter(attacked))['samples']} samples\n{attacked}")
    print("wrote", ", ".join(map(str, files)))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    check_report(arguments)
    check_count("--num-samples", arguments.num_samples)
    if arguments.attack:
        require("foolbox", "attacks")
    low, high = arguments.bounds
    if not low < high:
        raise ArgumentError(f"Expected `--bounds` LOW below HIGH, got {low:g} and {high:g}.")
    names = [_DENSE, *map(str, arguments.pruned)]
    if len(set(names)) < len(names):
        raise ArgumentError(f"Expected different folders, none called {_DENSE}, for `--pruned`.")


def _of(model: nn.Module, folder: Path) -> nn.Module:
    """A copy of the model with the state in a folder."""
    from torchprune_bayes.structured import load_shrunk

    twin = copy.deepcopy(model)
    if (folder / "shrunk.json").is_file():
        return load_shrunk(twin, folder).to(next(model.parameters()).device)
    if not (folder / "model.safetensors").is_file():
        raise ArgumentError(
            f"Expected model.safetensors of `prune` or shrunk.json of `shrink` in `{folder}`."
        )
    load_checkpoint(twin, folder / "model.safetensors")
    return twin


def _row(
    name: str, models: Mapping[str, nn.Module], measured: Measured | None, data: Data
) -> dict[str, Any]:
    model, dense = models[name], models[_DENSE]
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    zeros = sum(int((parameter == 0).sum()) for parameter in parameters)
    speedup = 1.0
    if name != _DENSE:
        speedup = compare_speed(dense, model, example_of(data, dense)).speedup
    return {
        "model": name,
        **({} if measured is None else measured.metrics),
        "parameters": size,
        "zeros": zeros / size,
        "speedup": speedup,
    }


def _attacked(
    arguments: argparse.Namespace, models: Mapping[str, nn.Module], data: Data
) -> ResultsTable:
    source = arguments.eval_data or arguments.data
    return evaluate_attacked(
        models,
        data.evaluation,
        attack=arguments.attack,
        epsilons=arguments.epsilons,
        bounds=tuple(arguments.bounds),
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        **normalisation_of(source, models[_DENSE]),
    )


def _write(
    arguments: argparse.Namespace,
    rows: ResultsTable,
    attacked: ResultsTable,
    measured: Mapping[str, Measured | None],
) -> list[Path]:
    files = []
    for name, table in {"evaluate": rows, "attacked": attacked}.items():
        if len(table):
            files += [arguments.output / f"{name}.{ending}" for ending in ("json", "csv")]
            table.to_json(files[-2])
            table.to_csv(files[-1])
    files.append(write_config(arguments))
    if arguments.report:
        drawings: dict[str, Drawing] = {}
        if len(attacked):
            heading = f"Accuracy against the strength of {arguments.attack}"
            drawings[heading] = lambda path: plot_attacked(attacked, path)
        sizes = ResultsTable(
            {key: row[key] for key in ("model", "parameters", "zeros", "speedup")} for row in rows
        )
        page = write_page(
            arguments,
            f"{arguments.model} and what pruning left of it",
            [f"Measured on {arguments.eval_data or arguments.data}."],
            models=measured,
            tables={"Size and speed": sizes},
            drawings=drawings,
        )
        files.append(page)
    return files
