"""``torchprune-bayes compare``: every method on a small real problem."""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from pathlib import Path
from time import perf_counter

from tqdm.auto import tqdm

from torchprune_bayes._checks import check_count, check_fraction
from torchprune_bayes._extras import require
from torchprune_bayes._files import check_writable
from torchprune_bayes.cli import _shrunk
from torchprune_bayes.cli._blocks import in_blocks
from torchprune_bayes.cli._experiment import (
    DENSE,
    STEPS,
    STRONGEST,
    Trial,
    Variant,
    variants,
)
from torchprune_bayes.cli._families import families_of
from torchprune_bayes.cli._help import Parser, command_parser
from torchprune_bayes.cli._page import Drawing, add_report_option, check_report, write_page
from torchprune_bayes.cli._plan import estimate, in_mib, in_words
from torchprune_bayes.cli._results import write_config
from torchprune_bayes.cli.digits import load_digits, one_thread, trained_network
from torchprune_bayes.errors import ArgumentError, TorchPruneBayesWarning
from torchprune_bayes.reports import ResultsTable, plot_comparison

SUMMARY = "compare all methods on a small real problem, in two minutes"
"""One line for the list of commands."""

_DESCRIPTION = """\
Train a small convolutional network on real 8 x 8 images of digits, prune copies of it with
every method at several sparsities, and compare what is left: accuracy, negative
log-likelihood (NLL), expected calibration error (ECE) and time. Nothing is downloaded, and
nothing is trained after pruning. One thread is used, for the network is too small for more.

A second part makes the network smaller with `shrink`, and times it: accuracy against speed.

OUTPUT holds compare.json and compare.csv, one row per run; compare.png, the best method of each
family, and below it the families one by one; shrink.png; and config.yaml, for --config. The last
line says what was best.
"""

_EXAMPLES = """\
  torchprune-bayes compare
  torchprune-bayes compare --methods magnitude woodfisher --sparsities 0.8 0.9 --seeds 3
  torchprune-bayes compare --methods woodfisher woodtaylor --steps 10 --output many_steps/
"""


def build_parser() -> Parser:
    """The parser of the subcommand."""
    parser = command_parser(
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    add = parser.add_argument
    add("--methods", nargs="+", metavar="NAME", help="methods to compare (default: all)")
    add(
        "--sparsities",
        nargs="+",
        type=float,
        default=[0.8, 0.9, 0.95, 0.98],
        metavar="S",
        help="fractions of the weights to prune, between 0 and 1",
    )
    add("--seeds", type=int, default=2, metavar="N", help="networks to train and prune")
    add("--num-samples", type=int, default=256, metavar="N", help="images to take gradients from")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="also prune in N steps, with new gradients in each, by every method that can "
        f"(default: {STEPS} by {STRONGEST} alone; 1 for none)",
    )
    add(
        "--shrink",
        nargs="*",
        type=float,
        metavar="S",
        help="fractions of the FLOPs to remove in the second part; none leaves it out (default: "
        f"{' '.join(map(str, _shrunk.DEFAULT))}, none with --methods)",
    )
    add("--output", type=Path, default=Path("results"), metavar="FOLDER", help="where to write")
    add("--no-plot", action="store_true", help="write no figure, which needs matplotlib")
    add("--quiet", action="store_true", help="print the table and the best method, nothing else")
    add("--json", action="store_true", help="print the rows of all runs as JSON and nothing else")
    add_report_option(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison, print and write it; returns the exit code."""
    _settle(arguments)
    compared = variants(arguments.methods, arguments.steps)
    check_writable(arguments.output)
    begin = perf_counter()
    with one_thread(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TorchPruneBayesWarning)
        table, shrunk = _all_rows(arguments, compared)
    best = _best(table, compared)
    files = _write(table, shrunk, arguments, compared, best)
    if arguments.json:
        print(files[0].read_text(encoding="utf-8"), end="")
        return _exit_code(table)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(f"{_caption(arguments, compared)}\n\n{in_blocks(table, width)}")
    if len(shrunk):
        print(f"\n{_shrunk.in_lines(shrunk, _dense(table))}")
    if not arguments.quiet:
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            print(f"warning: {message}")
        print(f"\nwrote {', '.join(map(str, files))} in {in_words(perf_counter() - begin)}")
    if best:
        print(f"\n{best}")
    return _exit_code(table)


def _exit_code(table: ResultsTable) -> int:
    return 1 if "error" in table.columns else 0


def _all_rows(
    arguments: argparse.Namespace, compared: list[Variant]
) -> tuple[ResultsTable, ResultsTable]:
    """The rows of the methods, and those of shrunk networks."""
    table, shrunk = ResultsTable(), ResultsTable()
    runs = len(compared) * len(arguments.sparsities)
    total = arguments.seeds * (1 + runs + len(arguments.shrink))
    # None: no bar if stderr is not a terminal.
    with tqdm(total=total, unit="run", disable=True if arguments.quiet else None) as bar:
        for seed in range(arguments.seeds):
            bar.set_description("training")
            trial = Trial(trained_network(seed), seed, arguments.num_samples)
            table.add(**trial.dense())
            bar.update()
            if not seed and not arguments.quiet:
                bar.write(_plan(trial, compared, runs * arguments.seeds))
            for variant in compared:
                bar.set_description(variant.label)
                for sparsity in arguments.sparsities:
                    table.add(**trial.pruned(variant, sparsity))
                    bar.update()
            bar.set_description("shrink")
            for sparsity in arguments.shrink:
                shrunk.add(**_shrunk.shrunk_row(trial, sparsity))
                bar.update()
    return table, shrunk


def _dense(table: ResultsTable) -> float:
    """Mean accuracy of the networks before pruning."""
    accuracies = [float(row["accuracy"]) for row in table if row["method"] == DENSE]
    return sum(accuracies) / len(accuracies)


def _settle(arguments: argparse.Namespace) -> None:
    """Derive settings from other options, and refuse impossible ones."""
    arguments.quiet |= arguments.json
    if arguments.shrink is None:
        arguments.shrink = [] if arguments.methods else list(_shrunk.DEFAULT)
    _check(arguments)
    check_report(arguments)


def _check(arguments: argparse.Namespace) -> None:
    check_count("--seeds", arguments.seeds)
    check_count("--num-samples", arguments.num_samples)
    if arguments.steps is not None:
        check_count("--steps", arguments.steps)
    for sparsity in arguments.sparsities:
        check_fraction("--sparsities", sparsity, closed=False)
        if not sparsity:
            raise ArgumentError("Expected `--sparsities` above 0, got 0.0: dense is always shown.")
    for sparsity in arguments.shrink:
        check_fraction("--shrink", sparsity, closed=False)
    largest = len(load_digits().train)
    if arguments.num_samples > largest:
        raise ArgumentError(
            f"Expected `--num-samples` of at most {largest}, got {arguments.num_samples}."
        )
    if not arguments.no_plot:
        require("matplotlib", "cli")


def _plan(trial: Trial, compared: list[Variant], runs: int) -> str:
    plan = estimate(trial.calibration(trial.model))
    steps = sum(
        variant.options.get("steps", 1) for variant in compared if variant.needs_calibration
    )
    seconds = plan.gradient_seconds * steps * runs / len(compared)
    return (
        f"plan: {runs} prunings of a network with {plan.weights:,} weights; {plan.samples} samples "
        f"give {in_mib(plan.gradient_mb)} of gradients\n"
        f"      about {in_words(seconds)} for gradients in all, an estimate from a few; solving "
        "comes on top\n"
    )


def _caption(arguments: argparse.Namespace, compared: list[Variant]) -> str:
    several = arguments.seeds > 1
    networks = (
        f"{arguments.seeds} networks, mean ± standard deviation" if several else "one network"
    )
    lines = [
        f"Digits: {len(load_digits().test)} test images, {networks}; pruned after training, no "
        "fine-tuning.",
        f"Gradients come from {arguments.num_samples} training images; damping and step sizes are "
        "chosen on validation images.",
        "Updates of the remaining weights, gradient steps for woodtaylor, are part of a method.",
    ]
    limits = [variant for variant in compared if variant.is_limited]
    if limits:
        shown = ", ".join(f"{variant.label} with {variant.shown_options}" for variant in limits)
        lines.append(f"Not at its defaults, to save time: {shown}.")
    return "\n".join(lines)


def _best(table: ResultsTable, compared: list[Variant]) -> str:
    """The method with the highest mean accuracy over all sparsities, and a call of it."""
    runs = ResultsTable(row for row in table if "error" not in row and row["method"] != DENSE)
    means = {
        str(row["method"]): 100 * float(row["accuracy_mean"])
        for row in runs.summarise(["method"], ["accuracy"])
    }
    if not means:
        return ""
    label = max(means, key=lambda label: means[label])
    [best] = [variant for variant in compared if variant.label == label]
    shown = "".join(f" --options.{key} {value}" for key, value in best.options.items())
    return (
        f"Best on these digits, {means[label]:.1f} % on average: {label}. "
        f"On your model: torchprune-bayes prune --method {best.method}{shown} ..."
    )


def _write(
    table: ResultsTable,
    shrunk: ResultsTable,
    arguments: argparse.Namespace,
    compared: list[Variant],
    best: str,
) -> list[Path]:
    """Write rows, figures and the page; the files, the JSON first."""
    files = [arguments.output / "compare.json", arguments.output / "compare.csv"]
    write_config(arguments)
    rows = ResultsTable([*table, *shrunk])
    rows.to_json(files[0])
    rows.to_csv(files[1])
    drawings = _drawings(table, shrunk, compared)
    if not arguments.no_plot:
        for name, (_, draw) in drawings.items():
            files.append(arguments.output / f"{name}.png")
            draw(files[-1])
    if arguments.report:
        successes = ResultsTable(row for row in table if "error" not in row)
        page = write_page(
            arguments,
            "Pruning methods compared on digits",
            [*_caption(arguments, compared).splitlines(), best],
            tables={
                "Accuracy": successes.summarise(["method", "sparsity"], ["accuracy", "nll", "ece"])
            },
            drawings=dict(drawings.values()),
        )
        files.append(page)
    return files


def _drawings(
    table: ResultsTable, shrunk: ResultsTable, compared: list[Variant]
) -> dict[str, tuple[str, Drawing]]:
    """Figures by the name of their file, each with its heading."""
    drawings: dict[str, tuple[str, Drawing]] = {}
    rows = ResultsTable(row for row in table if "error" not in row)
    if any(row["method"] != DENSE for row in rows):
        families = families_of(compared)
        title = "Digits, no fine-tuning"
        drawings["compare"] = (
            "The best of each family, and each family",
            lambda path: plot_comparison(rows, path, families, title=title),
        )
    if len(shrunk):
        dense = _dense(table)
        drawings["shrink"] = (
            "Accuracy against measured speed",
            lambda path: _shrunk.plot_shrunk(shrunk, dense, path),
        )
    return drawings
