"""``torchprune-bayes reproduce``: a published table, ours beside it."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from torchprune_bayes._checks import check_count, check_fraction
from torchprune_bayes._extras import optional
from torchprune_bayes._files import check_writable
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.cli._headlines import HEADLINES, Headline, Setting
from torchprune_bayes.cli._help import Parser, command_parser
from torchprune_bayes.cli._plan import in_words
from torchprune_bayes.cli._results import write_config
from torchprune_bayes.cli._sources import load_checkpoint
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods import prune_global
from torchprune_bayes.params import prunable_parameters
from torchprune_bayes.reports import ResultsTable, evaluate

SUMMARY = "repeat a published table, with the paper's numbers beside ours"
"""One line for the list of commands."""

_DESCRIPTION = f"""\
Repeat a table of a paper on data that you have: the network is trained, or loaded from
--checkpoint, pruned at once by the methods and settings of the table, and not fine-tuned.
NAME is one of {", ".join(HEADLINES)}.

DATA is a folder as torchvision.datasets.MNIST(DATA) makes it; nothing is downloaded. --scale
takes that share of the epochs and of the calibration samples.

OUTPUT holds reproduce.json and reproduce.csv, a row per run, and config.yaml, for --config.
"""

_EXAMPLES = """\
  torchprune-bayes reproduce woodfisher-mlpnet --data DATA
  torchprune-bayes reproduce cbs-mlpnet --data DATA --scale 0.1 --seeds 3
  torchprune-bayes reproduce cbs-mlpnet --data DATA --checkpoint authors.safetensors
"""

_MEAN, _STD = 0.1307, 0.3081
_SIZES = (784, 40, 20, 10)
_FEWEST = 32  # samples, at any scale
_COLUMNS = ("label", "sparsity", "paper")


def build_parser() -> Parser:
    """The parser of the subcommand."""
    parser = command_parser(description=_DESCRIPTION, examples=_EXAMPLES)
    add = parser.add_argument
    add("name", choices=list(HEADLINES), metavar="NAME", help="which table")
    add("--data", type=Path, required=True, metavar="FOLDER", help="root of torchvision's MNIST")
    add(
        "--checkpoint", type=Path, metavar="FILE", help="weights of the network; else it is trained"
    )
    add("--scale", type=float, default=1.0, metavar="S", help="share of the full setting, up to 1")
    add("--seeds", type=int, default=1, metavar="N", help="draws of the calibration samples")
    add("--output", type=Path, default=Path("reproduced"), metavar="FOLDER", help="where to write")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Train or load, prune, print and write; returns the exit code."""
    check_count("--seeds", arguments.seeds)
    check_fraction("--scale", arguments.scale)
    if not arguments.scale:
        raise ArgumentError("Expected `--scale` above 0, got 0.")
    headline = HEADLINES[arguments.name]
    train, test = (_mnist(arguments.data, training) for training in (True, False))
    check_writable(arguments.output)
    begin = perf_counter()
    model = mlpnet()
    if arguments.checkpoint is None:
        _train(model, train, max(1, round(headline.epochs * arguments.scale)))
    else:
        load_checkpoint(model, arguments.checkpoint)
    table = ResultsTable()
    table.add(label="dense", sparsity=0.0, paper=headline.dense, seed=0, ours=_percent(model, test))
    for setting in headline.settings:
        for sparsity, published in setting.published.items():
            for seed in range(arguments.seeds if setting.samples else 1):
                twin = _pruned(model, train, setting, sparsity, seed, arguments.scale)
                table.add(
                    label=setting.label,
                    sparsity=sparsity,
                    paper=published,
                    seed=seed,
                    ours=_percent(twin, test),
                )
    files = [arguments.output / f"reproduce.{ending}" for ending in ("json", "csv")]
    table.to_json(files[0])
    table.to_csv(files[1])
    files.append(write_config(arguments))
    print(_shown(headline, table, arguments.scale))
    seconds = in_words(perf_counter() - begin)
    print(f"wrote {', '.join(map(str, files))} in {seconds}")
    return 0


def mlpnet() -> nn.Sequential:
    """MLPNet: 784-40-20-10 with ReLU and no biases, as the tables of these papers have it."""
    model = nn.Sequential(nn.Flatten())
    for number, (inputs, outputs) in enumerate(itertools.pairwise(_SIZES), start=1):
        if number > 1:
            model.add_module(f"relu{number - 1}", nn.ReLU())
        model.add_module(f"fc{number}", nn.Linear(inputs, outputs, bias=False))
    return model


def _mnist(root: Path, training: bool) -> TensorDataset:
    with optional("torchvision", "timm"):
        from torchvision.datasets import MNIST
    try:
        found = MNIST(root, train=training)
    except RuntimeError as error:
        raise ArgumentError(
            f"Expected MNIST in `{root}` as torchvision lays it out, with "
            "MNIST/raw/train-images-idx3-ubyte and the three files beside it."
        ) from error
    return TensorDataset((found.data.float() / 255.0 - _MEAN) / _STD, found.targets)


def _train(model: nn.Module, data: TensorDataset, epochs: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        batches = _loader(data, 64)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
        for _ in range(epochs):
            for inputs, targets in batches:
                optimizer.zero_grad()
                cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                schedule.step()
    model.eval()


def _pruned(
    model: nn.Module,
    data: TensorDataset,
    setting: Setting,
    sparsity: float,
    seed: int,
    scale: float,
) -> nn.Module:
    twin = mlpnet()
    twin.load_state_dict(model.state_dict())
    options = dict(setting.options)
    if setting.samples:
        samples = max(_FEWEST, round(setting.samples * scale))
        options["calibration"] = Calibration(
            twin.eval(), _loader(data, 512), cross_entropy, num_samples=samples, seed=seed
        )
    prune_global(prunable_parameters(twin), setting.method, amount=sparsity, **options)
    return twin


def _loader(data: TensorDataset, size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches in a random order, indexed at once."""
    return DataLoader(data, sampler=BatchSampler(RandomSampler(data), size, False), batch_size=None)


def _percent(model: nn.Module, data: TensorDataset) -> float:
    inputs, labels = data.tensors
    return (
        100.0 * evaluate(model, zip(inputs.split(1000), labels.split(1000), strict=True)).accuracy
    )


def _shown(headline: Headline, table: ResultsTable, scale: float) -> str:
    rows = ResultsTable()
    for row in table.summarise(list(_COLUMNS), ["ours"]):
        rows.add(
            method=row["label"],
            sparsity=row["sparsity"],
            paper=row["paper"],
            ours_mean=round(float(row["ours_mean"]), 2),
            ours_std=round(float(row["ours_std"]), 2),
        )
    lines = [f"{headline.title} ({headline.paper}); test accuracy in percent", str(rows)]
    if scale < 1:
        lines.append(f"At {scale:g} of the epochs and calibration samples of the paper.")
    return "\n".join([*lines, headline.differs])
