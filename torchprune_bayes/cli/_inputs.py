"""The options that name model and data, and what they name; ``prune`` and ``shrink`` share them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprune_bayes._checks import check_count
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.cli._help import Parser
from torchprune_bayes.cli._measuring import loss_for
from torchprune_bayes.cli._page import add_report_option
from torchprune_bayes.cli._sources import Data, load_data, load_model
from torchprune_bayes.cli._text import TextOptions
from torchprune_bayes.cli.digits import CalibrationDigits
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.types import ParameterPairs


def add_model_options(parser: Parser) -> None:
    """Add the options that name model and data."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        required=True,
        metavar="SOURCE",
        help="timm:NAME, hf:NAME_OR_FOLDER or module:callable, which returns a torch.nn.Module",
    )
    group.add_argument(
        "--model-options",
        type=dict[str, int | float | bool | str | None],
        default={},
        metavar="KEY=VALUE",
        help="arguments for building the model, such as --model-options.num_classes 10",
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights to load: .safetensors, or a .pt file of tensors (loaded with weights_only)",
    )
    group.add_argument(
        "--random-init",
        action="store_true",
        help="leave timm and hf models at random weights instead of the published ones",
    )
    group.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="names of modules to leave alone with all inside, such as the classifier",
    )
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help="digits; a folder of images with a folder per class; a .csv, .tsv, .jsonl, .parquet "
        "or .txt file of texts or hf:NAME of the Hub, for models of transformers; or "
        "module:callable, which returns batches",
    )
    group.add_argument(
        "--eval-data",
        metavar="SOURCE",
        help="data to measure with, as --data (default: test images for digits, else --data)",
    )
    group.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images or texts per batch"
    )
    group.add_argument(
        "--text-column",
        nargs="+",
        default=["text"],
        metavar="COLUMN",
        help="column of the texts, or two for pairs; numbers, from 0, if a file has no header",
    )
    group.add_argument(
        "--label-column", default="label", metavar="COLUMN", help="column of the labels"
    )
    group.add_argument(
        "--max-length", type=int, default=128, metavar="N", help="tokens of a text at most"
    )


def add_running_options(parser: Parser, output: str, *, gradients: bool = True) -> None:
    """Add the options that say where to compute and where to save."""
    group = parser.add_argument_group("running and saving")
    group.add_argument("--device", help="where to compute (default: cuda if there is one)")
    if gradients:
        group.add_argument(
            "--memory-mb", type=float, default=1024.0, metavar="MIB", help="budget for gradients"
        )
    group.add_argument(
        "--output", type=Path, default=Path(output), metavar="FOLDER", help="where to save"
    )
    add_report_option(group)


def add_sample_options(group: argparse._ActionsContainer) -> None:
    """Add the options that say what gradients are taken from."""
    group.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help="calibration samples to take gradients from (default: 1024 mini-batches or all)",
    )
    group.add_argument(
        "--mini-batch",
        type=int,
        default=1,
        metavar="M",
        help="samples averaged into one gradient: M times less memory",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of draws and of random weights"
    )


def loaded(arguments: argparse.Namespace) -> tuple[nn.Module, Data | None]:
    """The model, in eval mode on its device, and the data, if any were named.

    Raises:
        ArgumentError: If model, data, columns or device do not exist.
    """
    check_count("--max-length", arguments.max_length, minimum=2)
    if len(arguments.text_column) > 2:
        raise ArgumentError(
            f"Expected one or two columns for --text-column, got {len(arguments.text_column)}."
        )
    model = load_model(
        arguments.model,
        checkpoint=arguments.checkpoint,
        random_init=arguments.random_init,
        options=arguments.model_options,
    )
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device).eval()
    except RuntimeError as error:
        raise ArgumentError(f"Expected a device for --device, got {device!r}: {error}") from error
    if arguments.data is None:
        return model, None
    data = load_data(
        arguments.data,
        arguments.eval_data,
        model,
        batch_size=arguments.batch_size,
        num_samples=arguments.num_samples,
        text=TextOptions(
            tuple(arguments.text_column),
            arguments.label_column,
            arguments.max_length,
            arguments.batch_size,
        ),
    )
    return model, data


def calibration_of(
    arguments: argparse.Namespace, model: nn.Module, data: Data, params: ParameterPairs | None
) -> Calibration:
    """What gradients are taken from."""
    num_samples = arguments.num_samples
    if num_samples is None and isinstance(data.calibration, CalibrationDigits):
        num_samples = data.calibration.num_samples  # what follows is held out
    return Calibration(
        model,
        data.calibration,
        loss_for(data.calibration),
        params=params,
        num_samples=num_samples,
        mini_batch=arguments.mini_batch,
        seed=arguments.seed,
        memory_mb=arguments.memory_mb,
    )


def example_of(data: Data, model: nn.Module) -> Any:
    """A few inputs of the data, as the model takes them, on its device."""
    device = next(model.parameters()).device
    batch = next(iter(data.calibration))
    if isinstance(batch, Mapping):
        return {name: value[:4].to(device) for name, value in batch.items() if name != "labels"}
    return batch[0][:4].to(device)
