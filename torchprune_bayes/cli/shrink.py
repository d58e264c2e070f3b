"""``torchprune-bayes shrink``: a smaller model, measured and saved."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, get_args

import torch

from torchprune_bayes._checks import check_fraction
from torchprune_bayes._files import check_writable
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.cli._help import Parser, command_parser
from torchprune_bayes.cli._inputs import (
    add_model_options,
    add_running_options,
    add_sample_options,
    calibration_of,
    example_of,
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
from torchprune_bayes.cli._page import check_report, settings_of, write_page
from torchprune_bayes.cli._plan import in_words
from torchprune_bayes.cli._results import write_config, write_report
from torchprune_bayes.cli._shrink_plan import estimate_shrinking
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.reports import (
    LayerChange,
    ResultsTable,
    Speed,
    compare_speed,
    plot_loss_curves,
)
from torchprune_bayes.structured import ShrinkReport, save_shrunk, shrink
from torchprune_bayes.structured.tracing import Heads

if TYPE_CHECKING:
    from torchprune_bayes.structured import UnitImportance

_BY_LOSS = "loss"
_PLURALS = {
    "channel": "channels",
    "hidden": "hidden units",
    "head": "heads",
    "dimension": "dimensions of heads",
}

SUMMARY = "remove channels, hidden units or heads for good and save the smaller model"
"""One line for the list of commands."""

_DESCRIPTION = """\
Remove the channels, hidden units or heads that matter least from a model, for good, and save
what is left. By default units are scored and made up for with the calibration data, and how
much each layer loses is decided by measured loss curves.

OUTPUT holds shrunk.safetensors and shrunk.json, which torchprune_bayes.structured.load_shrunk
gives to a newly built model, report.json (sizes, units left in each group, metrics and time of a
forward pass before and after), and config.yaml, all options as they were, for --config. Fine-tune
the result as any other model.
"""

_EXAMPLES = """\
  # runs as it is: a small network on 8 x 8 digits
  torchprune-bayes shrink --model torchprune_bayes.cli.digits:trained_network \\
      --data digits --sparsity 0.5

  # a published image model, on images in one folder per class, half of the FLOPs
  torchprune-bayes shrink --model timm:resnet18 --data imagenet/train \\
      --eval-data imagenet/val --sparsity 0.5 --target flops --round-to 8

  # a classifier of texts, on a table of texts and labels
  torchprune-bayes shrink --model hf:FOLDER --data train.csv --eval-data dev.csv \\
      --text-column sentence --label-column label --sparsity 0.3 --exclude classifier
"""


def build_parser() -> Parser:
    """The parser of the subcommand."""
    parser = command_parser(
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    add_model_options(parser)
    group = parser.add_argument_group("shrinking")
    group.add_argument(
        "--sparsity",
        type=float,
        required=True,
        metavar="S",
        help="fraction of the target that is to go, between 0 and 1",
    )
    group.add_argument(
        "--target",
        choices=["params", "flops", "channels", "latency", "memory"],
        default="params",
        help="what the sparsity counts",
    )
    group.add_argument(
        "--importance",
        default=_BY_LOSS,
        metavar="NAME",
        help="loss: by the data, the recommended way; or l1filter, opd, snapit, woodfisher, ...",
    )
    group.add_argument(
        "--evaluations",
        type=int,
        default=60,
        metavar="N",
        help="evaluations of the loss for the curves of --importance loss: fewer are faster",
    )
    group.add_argument(
        "--round-to", type=int, default=1, metavar="N", help="leave multiples of N units"
    )
    group.add_argument(
        "--heads",
        choices=get_args(Heads),
        help="of attention: remove heads as a whole, dimensions inside of all heads, or either: "
        "dimensions where they can be had (default with --importance loss and --target flops)",
    )
    add_sample_options(group)
    add_running_options(parser, "shrunk")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Load, shrink, measure, save; returns the exit code."""
    check_fraction("sparsity", arguments.sparsity, closed=False)
    check_report(arguments)
    torch.manual_seed(arguments.seed)
    model, data = loaded(arguments)
    if data is None:
        raise ArgumentTypeError("Expected --data to shrink with, got none.")
    example = example_of(data, model)
    calibration = calibration_of(arguments, model, data, None)
    importance = _importance(arguments, calibration)
    check_writable(arguments.output)
    _print_plan(arguments, calibration, importance)
    before, whole = measure(model, data.evaluation), copy.deepcopy(model)
    begin = perf_counter()
    with metered() as meter:
        shrunk = shrink(
            model,
            example,
            importance,
            sparsity=arguments.sparsity,
            target=arguments.target,
            calibration=calibration,
            evaluations=arguments.evaluations,
            round_to=arguments.round_to,
            ignored=arguments.exclude,
            heads=arguments.heads,
        )
    seconds = perf_counter() - begin
    speed, after = compare_speed(whole, model, example), measure(model, data.evaluation)
    report: dict[str, Any] = {
        "command": arguments.command,
        "settings": settings_of(arguments),
        "seconds": seconds,
        "parameters": asdict(shrunk.parameters),
        "units": {
            g.name: {"before": g.units.before, "after": g.units.after} for g in shrunk.groups
        },
        "speedup": {"median": speed.speedup, "low": speed.speedup_low, "high": speed.speedup_high},
        "metrics": metrics_of(before, after, data.evaluated_on),
        **energy_of(meter),
    }
    save_shrunk(model, arguments.output)
    files = [arguments.output / "shrunk.safetensors", write_report(arguments.output, report)]
    files.append(write_config(arguments))
    lines = [*energy_lines(meter), *metric_lines(before, after, data.evaluated_on)]
    if arguments.report:
        files.append(_write_page(arguments, shrunk, speed, {"before": before, "after": after}))
    print("\n".join([str(shrunk), f"forward pass: {speed}", *lines]))
    print(f"wrote {', '.join(map(str, files))}, in {in_words(seconds)}")
    return 0


def _print_plan(
    arguments: argparse.Namespace,
    calibration: Calibration,
    importance: Calibration | UnitImportance,
) -> None:
    measured = isinstance(importance, Calibration)
    plan = estimate_shrinking(
        calibration,
        arguments.evaluations if measured else 0,
        scored_by_gradients=isinstance(importance, Calibration) or importance.needs_recalibration,
    )
    calibration.progress = sys.stderr.isatty()
    scored = f"gradients of {plan.samples:,} samples"
    repaired = f"a repair on {plan.samples:,} samples, no gradients"
    curves = (
        f", {plan.evaluations} evaluations of the loss on {plan.tried:,} of them at most"
        if measured
        else ""
    )
    print(
        f"plan: {scored if plan.gradients else repaired}{curves}\n"
        f"      up to about {in_words(plan.seconds)} for "
        f"{'gradients and ' if plan.gradients else ''}forward passes, estimated from one; solving\n"
        "      and measuring the model before and after come on top; a smaller "
        f"--num-samples{' or --evaluations' if measured else ''} is faster",
        flush=True,
    )


def _importance(
    arguments: argparse.Namespace, calibration: Calibration
) -> Calibration | UnitImportance:
    if arguments.importance == _BY_LOSS:
        return calibration
    # Importances load torch-pruning, which a command line without them does not need.
    from torchprune_bayes.integrations.importances import importance_of

    return importance_of(arguments.importance, calibration)


def _write_page(
    arguments: argparse.Namespace,
    shrunk: ShrinkReport,
    speed: Speed,
    models: Mapping[str, Measured | None],
) -> Path:
    counts = {"parameters": shrunk.parameters, "FLOPs": shrunk.flops, "units": shrunk.units}
    sizes = ResultsTable()
    for name, amount in counts.items():
        if amount is not None:
            sizes.add(size=name, before=amount.before, after=amount.after)
    sizes.add(
        size="forward pass in ms", before=speed.milliseconds_before, after=speed.milliseconds_after
    )
    return write_page(
        arguments,
        f"{arguments.model} shrunk by {arguments.sparsity:.0%} of its {arguments.target}",
        [
            f"A forward pass takes {speed}; the last three numbers are the speed-up, its smallest "
            "and its largest value over pairs of passes.",
            *(f"Left whole: {name}, since {why}" for name, why in shrunk.left_out.items()),
        ],
        models=models,
        tables={"Size and latency": sizes},
        layers=[
            LayerChange(group.name, _PLURALS[group.kind], *astuple(group.units))
            for group in shrunk.groups
        ],
        drawings={
            "Loss against removed units, group by group": lambda path: plot_loss_curves(
                shrunk.curves, path
            )
        }
        if shrunk.curves
        else {},
    )
