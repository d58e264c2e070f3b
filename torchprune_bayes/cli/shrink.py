"""``torchprune-bayes shrink``: a smaller model, measured and saved."""

from __future__ import annotations

import argparse
import copy
from time import perf_counter
from typing import Any

import torch

from torchprune_bayes._checks import check_fraction
from torchprune_bayes._files import check_writable
from torchprune_bayes.cli._help import add_command
from torchprune_bayes.cli._inputs import (
    add_model_options,
    add_running_options,
    add_sample_options,
    calibration_of,
    example_of,
    loaded,
)
from torchprune_bayes.cli._plan import in_words
from torchprune_bayes.cli._results import measure, metric_lines, write_report
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.reports import compare_speed
from torchprune_bayes.structured import save_shrunk, shrink

_BY_LOSS = "loss"

_DESCRIPTION = """\
Remove the channels, hidden units or heads that matter least from a model, for good, and save
what is left. By default units are scored and made up for with the calibration data, and how
much each layer loses is decided by measured loss curves.

OUTPUT holds shrunk.safetensors and shrunk.json, which torchprune_bayes.structured.load_shrunk
gives to a freshly built model, and report.json (sizes, units left in each group, metrics and
time of a forward pass before and after). Fine-tune the result as any other model.
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


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "shrink",
        summary="remove channels, hidden units or heads for good and save the smaller model",
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
        "--round-to", type=int, default=1, metavar="N", help="leave multiples of N units"
    )
    add_sample_options(group)
    add_running_options(parser, "shrunk")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load, shrink, measure, save; returns the exit code."""
    check_fraction("sparsity", arguments.sparsity, closed=False)
    torch.manual_seed(arguments.seed)
    model, data = loaded(arguments)
    if data is None:
        raise ArgumentTypeError("Expected --data to shrink with, got none.")
    example = example_of(data, model)
    before, whole = measure(model, data.evaluation), copy.deepcopy(model)
    calibration = calibration_of(arguments, model, data, None)
    importance: Any = calibration
    if arguments.importance != _BY_LOSS:
        # Importances load torch-pruning, which a command line without them does not need.
        from torchprune_bayes.integrations._importances import importance_of

        importance = importance_of(arguments.importance, calibration)
    check_writable(arguments.output)
    begin = perf_counter()
    found = shrink(
        model,
        example,
        importance,
        sparsity=arguments.sparsity,
        target=arguments.target,
        round_to=arguments.round_to,
        ignored=arguments.exclude,
    )
    seconds = perf_counter() - begin
    speed = compare_speed(whole, model, example)
    report: dict[str, Any] = {
        "command": arguments.command,
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("run", "command")},
        "seconds": seconds,
        "parameters": {"before": found.parameters.before, "after": found.parameters.after},
        "units": {g.name: {"before": g.units.before, "after": g.units.after} for g in found.groups},
        "speedup": {"median": speed.speedup, "low": speed.speedup_low, "high": speed.speedup_high},
        "metrics": {
            "data": data.evaluated_on,
            "before": before,
            "after": measure(model, data.evaluation),
        },
    }
    save_shrunk(model, arguments.output)
    path = write_report(arguments.output, report)
    print(found)
    print(f"forward pass: {speed}")
    print("\n".join(metric_lines(report["metrics"])))
    print(f"wrote {arguments.output / 'shrunk.safetensors'} and {path}, in {in_words(seconds)}")
    return 0
