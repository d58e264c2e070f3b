"""``torchprune-bayes reproduce``: a published table with our results."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from torchprune_bayes._extras import require
from torchprune_bayes._files import check_writable, reading, write_whole
from torchprune_bayes.cli._help import Parser, command_parser
from torchprune_bayes.cli._options import checked_options, options_of
from torchprune_bayes.cli._plan import in_words
from torchprune_bayes.cli._results import write_config
from torchprune_bayes.cli._sources import load_checkpoint
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments import EXPERIMENTS, Experiment
from torchprune_bayes.experiments.engine import Run, as_table, load_split
from torchprune_bayes.experiments.gated import closed_in
from torchprune_bayes.experiments.starts import Trained
from torchprune_bayes.experiments.tables.cbs import PUBLISHED_NAMES
from torchprune_bayes.experiments.trial import Setting
from torchprune_bayes.experiments.weights import Method, SavedMasks, read_masks
from torchprune_bayes.methods import find_method
from torchprune_bayes.reports import ResultsTable

SUMMARY = "repeat a published table, with the paper's numbers beside ours"
"""One line for the list of commands."""

_NAMES = "\n".join(
    f"  {name:<{max(map(len, EXPERIMENTS))}}  {it.title}" for name, it in EXPERIMENTS.items()
)

_DESCRIPTION = f"""\
Repeat a table of a paper on data that you have. NAME is one of

{_NAMES}

DATA is the folder of the data set as torchvision or the Hub lays it out, train/CLASS/ and
val/CLASS/ for image folders, train.csv and test.csv for texts; nothing is downloaded.

--scale takes that share of the epochs and of the calibration samples (below one epoch, of the
training examples), --width of the channels of each layer, for machines without an accelerator.

OUTPUT holds reproduce.json, reproduce.csv and reproduce.tex, a row per run in the first two,
figures where the paper has some, and config.yaml, for --config.
"""

_EXAMPLES = """\
  torchprune-bayes reproduce woodfisher-mlpnet --data DATA
  torchprune-bayes reproduce cbs-mlpnet --data DATA --scale 0.1 --seeds 3 --options.rho 20
  torchprune-bayes reproduce cbs-mlpnet --data DATA --checkpoint authors.safetensors
  torchprune-bayes reproduce woodfisher-resnet50 --data imagenet --checkpoint resnet50.pth
"""


def build_parser() -> Parser:
    """The parser of the subcommand."""
    parser = command_parser(description=_DESCRIPTION, examples=_EXAMPLES)
    add = parser.add_argument
    add("name", choices=list(EXPERIMENTS), metavar="NAME", help="which table")
    add("--data", type=Path, required=True, metavar="FOLDER", help="where the data set is")
    add("--checkpoint", type=Path, metavar="FILE", help="weights; else the network is trained")
    add("--model", type=str, metavar="NAME", help="transformer of the Hub or a folder of one")
    add("--scale", type=float, default=1.0, metavar="S", help="share of the full setting, up to 1")
    add("--width", type=float, default=1.0, metavar="W", help="share of the channels, up to 1")
    add("--image-size", type=int, metavar="N", help="pixels, in the place of the experiment's")
    add("--seeds", type=int, default=1, metavar="N", help="how often, with other random numbers")
    add("--device", type=str, default="cpu", help="cpu, cuda, ...")
    add("--options", type=dict[str, Any], default={}, metavar="K=V", help="options of the methods")
    add("--masks", type=Path, metavar="FILE", help="masks.safetensors for CBS's update alone")
    add("--matched", type=Path, metavar="FILE", help="reproduce.json with compressions to match")
    add("--tuning", action="store_true", help="measure on a fifth of the training data instead")
    add("--random-labels", action="store_true", help="train on labels drawn at random")
    add("--output", type=Path, default=Path("reproduced"), metavar="FOLDER", help="where to write")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Train or load, prune, print and write; returns the exit code."""
    setting = _setting(arguments)
    experiment = _with_options(EXPERIMENTS[arguments.name], arguments.options)
    _check_inputs(arguments.name, experiment, setting)
    data = load_split(experiment, arguments.data, setting)
    check_writable(arguments.output)
    begin, rows = perf_counter(), list[Mapping[str, Any]]()
    arguments.output.mkdir(parents=True, exist_ok=True)
    files, run = [write_config(arguments)], Run(experiment, data, setting)
    for row in run.rows():
        rows.append(row)  # written one by one: a run may take days
        written = _written(as_table(rows), arguments.output)
    print(_shown(experiment, as_table(rows), setting))
    files += [*(written if rows else []), *run.figures(arguments.output)]
    seconds = in_words(perf_counter() - begin)
    print(f"wrote {', '.join(map(str, files))} in {seconds}")
    return 0


def _setting(arguments: argparse.Namespace) -> Setting:
    checkpoint = arguments.checkpoint
    load = None if checkpoint is None else partial(load_checkpoint, path=checkpoint)
    matched = None if arguments.matched is None else _table(arguments.matched)
    return Setting(
        scale=arguments.scale,
        width=arguments.width,
        size=arguments.image_size,
        seeds=arguments.seeds,
        device=str(_device(arguments.device)),
        load=load,
        model=arguments.model,
        masks=arguments.masks,
        matched=matched,
        tuning=arguments.tuning,
        random_labels=arguments.random_labels,
    )


def _table(path: Path) -> ResultsTable:
    with reading(path, "rows of an earlier run"):
        return ResultsTable.from_json(path)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ArgumentError(f"Expected an available device, got {name!r}: {reason}.") from error


def _check_inputs(name: str, experiment: Experiment, setting: Setting) -> None:
    """Refuse options that an experiment does not use, or that would fail at its end."""
    if experiment.figures:
        require("matplotlib", "plots")
    prunings = [row.pruning for row in experiment.rows]
    if setting.masks is not None:
        if not any(isinstance(pruning, SavedMasks) for pruning in prunings):
            raise ArgumentError(f"Expected an experiment of CBS with `--masks`, got {name}.")
        read_masks(setting.masks)
    if setting.model is not None and experiment.hub is None:
        raise ArgumentError(f"Expected an experiment on texts with `--model`, got {name}.")
    if setting.load is not None and not any(
        isinstance(row.start, Trained) for row in experiment.rows
    ):
        raise ArgumentError(
            f"Expected no `--checkpoint` with {name}, whose training is part of what is "
            "measured, got one."
        )
    if setting.matched is not None:
        matched = {getattr(pruning, "matched", None) for pruning in prunings} - {None}
        if not matched:
            raise ArgumentError(f"Expected an experiment of BMRS with `--matched`, got {name}.")
        for label in matched:
            closed_in(setting.matched, str(label))


def _with_options(experiment: Experiment, given: Mapping[str, Any]) -> Experiment:
    """The experiment with options of its methods replaced, by their names or the paper's."""
    if not given:
        return experiment
    renamed = {PUBLISHED_NAMES.get(name, name): value for name, value in given.items()}
    methods = {
        row.label: method
        for row in experiment.rows
        if isinstance(method := getattr(row.pruning, "method", None), Method)
    }
    accepted = {
        label: options_of(find_method(method.name).method) for label, method in methods.items()
    }
    everything = sorted({name for options in accepted.values() for name in options})
    for name in renamed:
        if name not in everything:
            raise ArgumentError(
                f"Expected an option of the experiment's methods "
                f"({', '.join(everything) or 'none'}), got {name!r}."
            )
    rows = []
    for row in experiment.rows:
        if row.label in methods:
            method = methods[row.label]
            own = {name: value for name, value in renamed.items() if name in accepted[row.label]}
            options = {**method.options, **checked_options(method.name, own)}
            changed = dataclasses.replace(method, options=options)
            pruning: Any = dataclasses.replace(row.pruning, method=changed)  # type: ignore[type-var]
            row = dataclasses.replace(row, pruning=pruning)
        rows.append(row)
    return dataclasses.replace(experiment, rows=tuple(rows))


def _written(table: ResultsTable, output: Path) -> list[Path]:
    files = [output / f"reproduce.{ending}" for ending in ("json", "csv", "tex")]
    table.to_json(files[0])
    table.to_csv(files[1])
    latex = _summary(table).to_latex() + "\n"
    write_whole(files[2], lambda draft: draft.write_text(latex, encoding="utf-8"))
    return files


def _summary(table: ResultsTable) -> ResultsTable:
    """Means and standard deviations of our results, with the published numbers."""
    groups: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in table:
        groups.setdefault((row["label"], row.get("sparsity")), []).append(row)
    shown = _telling(table)
    published = [name for name in table.columns if name.startswith("paper")]
    rows = []
    for (label, sparsity), runs in groups.items():
        line: dict[str, Any] = {"method": label, "sparsity": sparsity}
        line |= {name: runs[0][name] for name in published if name in runs[0]}
        for name in shown:
            line |= _spread(name, [float(one[name]) for one in runs if name in one])
        rows.append(line)
    return as_table(rows)


def _telling(table: ResultsTable) -> list[str]:
    """Informative columns: no drop where none was published, no unchanged FLOPs."""
    columns = set(table.columns)
    first: list[str] = ["ours", "compression", "closed"]
    names = [name for name in first if name in columns]
    names += ["drop"] if "paper_drop" in columns else []
    for name in ("flops", "training_flops"):
        changed = any(abs(float(row.get(name, 100.0)) - 100.0) > 0.05 for row in table)
        names += [name] if changed or f"paper_{name}" in columns else []
    return names


def _spread(name: str, values: list[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    if not values:
        return {}
    mean = {f"{name}_mean": round(float(tensor.mean()), 2)}
    return mean if len(values) < 2 else mean | {f"{name}_std": round(float(tensor.std()), 2)}


def _shown(experiment: Experiment, table: ResultsTable, setting: Setting) -> str:
    on = "held-out training examples" if setting.tuning else "test examples"
    lines = [f"{experiment.title} ({experiment.paper}); accuracy on {on} in percent"]
    if len(table):
        lines.append(str(_summary(table)))
    if setting.scale < 1:
        lines.append(f"At {setting.scale:g} of the epochs and calibration samples of the paper.")
    if setting.width < 1:
        lines.append(f"At {setting.width:g} of the width of the paper's network.")
    if setting.random_labels:
        lines.append("Trained on labels drawn at random.")
    return "\n".join([*lines, experiment.differs] if experiment.differs else lines)
