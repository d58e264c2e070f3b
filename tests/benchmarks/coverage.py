"""Which architectures shrink, checked end to end; or why not, in one sentence.

    python -m tests.benchmarks.coverage [--only NAME] [--share 1/3] [--sparsity 0.3]
        [--rows FILE] [--minutes 9] [--shallow] [--order SEED]

For every architecture of ``architectures.py``, with random weights moved off their start: channels,
hidden units and heads go until the asked share is gone, those with the smallest L1 norm. Then the
shrunk model in double precision is compared with the whole one in which the same units are zero, a
backward pass in training mode must reach the cut weights, decoders must generate the same tokens
with a cache as the masked ones, and the model must come back from a folder, bit for bit here and
with the same outputs in a fresh process. Gates are attached, trained, folded and cut out;
every importance scores all groups; ``--shallow`` leaves these two out. Prints a Markdown table and
a line of totals. ``--share 1/3`` takes a third, another one every day. ``--rows FILE`` takes the
rows that the file has and appends new ones as soon as they are known, so that a run can go on where
it was stopped, by ``--minutes`` of CPU time or otherwise; without ``--shallow``, rows whose gates
and importances were not tried are made again. ``--order SEED`` shuffles.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import math
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tests.benchmarks.architectures import Architecture, architectures
from tests.benchmarks.coverage_depth import (
    WrongError,
    distance,
    examine_gates,
    examine_importances,
    in_double,
    outputs,
    short,
)
from tests.benchmarks.coverage_fresh import FreshProcess
from torchprune_bayes.errors import TorchPruneBayesError
from torchprune_bayes.structured import (
    L1FilterImportance,
    ShrinkReport,
    load_shrunk,
    save_shrunk,
    shrink,
    zero_units,
)
from torchprune_bayes.wiring.forward import run, tensors_in

TOLERANCES = {"double": 1e-9, "partly single": 1e-5}
"""Largest difference, relative to the largest output, that can be rounding: in double precision,
and in models that compute a part in single precision whatever their type."""


@dataclass(frozen=True)
class Row:
    """What was found for an architecture.

    Attributes:
        name: The architecture.
        result: ``"supported"``, ``"refused"``, ``"wrong"`` or ``"error"``.
        detail: Groups and what was left whole, or the reason.
        gates: How many gates can be attached, or why none.
        importances: How many importances score it, and which refuse.
        difference: Largest difference in double precision, relative to the largest output.
        seconds: CPU time of shrinking, its own checks included.
    """

    name: str
    result: str
    detail: str
    seconds: float
    difference: float | None = None
    gates: str = "–"
    importances: str = "–"

    def __str__(self) -> str:
        difference = "–" if self.difference is None else f"{self.difference:.0e}"
        cells = (self.name, self.result, self.detail, self.gates, self.importances, difference)
        return f"| {' | '.join(cells)} | {self.seconds:.1f} |"

    @classmethod
    def parsed(cls, line: str) -> Row:
        """Read what was printed."""
        name, result, detail, gates, scored, difference, seconds = (
            cell.strip() for cell in line.strip().strip("|").split("|")
        )
        found = None if difference == "–" else float(difference)
        return cls(name, result, detail, float(seconds), found, gates, scored)


HEADER = (
    "| architecture | result | groups, or why not | gates | importances | difference | CPU s |\n"
    "|---|---|---|---|---|---|---|"
)


def examine(
    case: Architecture, sparsity: float, fresh: FreshProcess | None = None, *, deep: bool = True
) -> Row:
    """Shrink one architecture and check everything.

    Args:
        case: The architecture.
        sparsity: Share of the units that is to go.
        fresh: Reloads the shrunk model; without it that is not checked.
        deep: Whether gates and importances are tried.
    """
    model = _built(case)
    twin = copy.deepcopy(model)
    row, report = _cut(case, model, sparsity)
    if report is None:
        return row
    try:
        if report.units.sparsity < sparsity:
            raise WrongError(f"{report.units.sparsity:.2f} of the units are gone")
        row = replace(row, difference=_checked(case, model, twin, report, fresh))
        if deep:
            build = partial(_built, case)
            row = replace(row, gates=examine_gates(case, build))
            row = replace(row, importances=examine_importances(case, build))
    except WrongError as error:
        return replace(row, result="wrong", detail=str(error))
    except Exception as error:
        return replace(row, result="error", detail=f"{type(error).__name__}: {short(error)}")
    return row


def wired(case: Architecture, sparsity: float) -> Row:
    """Shrink one architecture, with the comparison that ``shrink`` makes and no further check."""
    return _cut(case, _built(case), sparsity)[0]


def _cut(case: Architecture, model: nn.Module, sparsity: float) -> tuple[Row, ShrinkReport | None]:
    """Shrink a model; a report if that is supported."""
    start = time.process_time()
    try:
        report = shrink(
            model, case.inputs(2), L1FilterImportance(), sparsity=sparsity, target="channels"
        )
    except TorchPruneBayesError as error:
        return Row(case.name, "refused", short(error), time.process_time() - start), None
    except Exception as error:
        detail = f"{type(error).__name__}: {short(error)}"
        return Row(case.name, "error", detail, time.process_time() - start), None
    return Row(case.name, "supported", _groups(report), time.process_time() - start), report


def _built(case: Architecture) -> nn.Module:
    torch.manual_seed(0)
    model = case.build().eval()
    _stir(model)
    return model


def _stir(model: nn.Module) -> None:
    """Move vectors and constant weights, so that no unit hides behind a zero or a tiny scale."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(parameter.shape[-1] ** -0.5 * torch.randn_like(parameter))


def _groups(report: ShrinkReport) -> str:
    kinds = Counter(group.kind for group in report.groups)
    result = ", ".join(f"{count} of {kind}s" for kind, count in kinds.items())
    left = f"; {len(report.left_out)} left whole" if report.left_out else ""
    return f"{result.replace('hiddens', 'hidden units')}{left}"


def _checked(
    case: Architecture,
    model: nn.Module,
    twin: nn.Module,
    report: ShrinkReport,
    fresh: FreshProcess | None,
) -> float:
    zero_units(twin, report.plan)
    difference = _difference(case, model, twin)
    if _trains(case, twin):
        _train(case, model, report)
    if case.generates:
        _generate(case, model, twin)
    with tempfile.TemporaryDirectory() as folder:
        save_shrunk(model, folder)
        loaded = load_shrunk(case.build().eval(), folder).state_dict()
        expected = outputs(model, case.inputs(2))
        elsewhere = expected if fresh is None else fresh.outputs(case.name, folder)
    state = model.state_dict()
    if not all(torch.equal(loaded[name], value) for name, value in state.items()):
        raise WrongError("it comes back from a folder with other weights")
    if (distance(expected, elsewhere) or 0.0) > TOLERANCES["partly single"]:
        raise WrongError("it computes something else in a fresh process")
    return difference


def _difference(case: Architecture, model: nn.Module, twin: nn.Module) -> float:
    """Compare in double precision where the model runs in it."""
    result = distance(*(outputs(*in_double(each, case.inputs(2))) for each in (model, twin)))
    if result is None:
        raise WrongError("there are no outputs to compare")
    if result > TOLERANCES["partly single"]:
        raise WrongError(f"outputs differ by {result:.1g} of the largest")
    return result


def _trains(case: Architecture, twin: nn.Module) -> bool:
    """Whether the masked model runs in training mode on such small inputs."""
    try:
        run(copy.deepcopy(twin).train(), case.inputs(2))
    except Exception:
        return False
    return True


def _train(case: Architecture, model: nn.Module, report: ShrinkReport) -> None:
    """A step in training mode reaches the cut weights."""
    cut = [name for name, _ in model.named_parameters() if name in report.plan.kept]
    model.train()
    sum(each.float().square().mean() for each in tensors_in(run(model, case.inputs(2)))
        if each.requires_grad).backward()  # type: ignore[union-attr]  # fmt: skip
    model.eval()
    parameters = dict(model.named_parameters())
    without = [name for name in cut if parameters[name].grad is None]
    model.zero_grad()
    if len(without) == len(cut) and cut:
        raise WrongError("no cut weight gets a gradient")


def _generate(case: Architecture, model: nn.Module, twin: nn.Module) -> None:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if "decoder_input_ids" in case.inputs(1):
        settings["decoder_start_token_id"] = 1
    inputs = {"input_ids": case.inputs(2)["input_ids"]}
    tokens = [each.generate(**inputs, **settings) for each in (model, twin)]  # type: ignore[operator]
    if not torch.equal(*tokens):
        raise WrongError("it generates other tokens than the masked model")


def chosen(only: str, share: Fraction, day: int) -> Iterator[Architecture]:
    """Yield the architectures with a part of a name, or the share of a day."""
    for place, case in enumerate(architectures()):
        if (
            only.lower() in case.name.lower()
            and (place + day) % share.denominator < share.numerator
        ):
            yield case


def summary(rows: Sequence[Row]) -> str:
    """Count results, and name the slowest."""
    counts = Counter(row.result for row in rows)
    slowest = max(rows, key=lambda row: row.seconds)
    found = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    return (
        f"{len(rows)} architectures: {found}; slowest {slowest.name}, {slowest.seconds:.1f} CPU s"
    )


def known_rows(file: Path | None) -> dict[str, Row]:
    """Read the last row of every architecture from a file, if it is there."""
    lines = file.read_text().splitlines() if file and file.exists() else []
    return {row.name: row for row in (Row.parsed(line) for line in lines if line.startswith("| t"))}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of an architecture's name")
    parser.add_argument("--share", type=Fraction, default=Fraction(1), help="such as 1/3")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--rows", type=Path, help="file that rows are read from and appended to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of CPU time, then stop")
    parser.add_argument("--shallow", action="store_true", help="without gates and importances")
    parser.add_argument("--order", type=int, help="seed of a random order")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    arguments = _arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    day = datetime.date.today().toordinal()
    cases = list(chosen(arguments.only, arguments.share, day))
    rows = known_rows(arguments.rows)
    todo = [case for case in cases if _is_open(rows.get(case.name), deep=not arguments.shallow)]
    if arguments.order is not None:
        random.Random(arguments.order).shuffle(todo)
    with FreshProcess() as fresh, contextlib.redirect_stderr(None):
        for case in todo:
            if time.process_time() > 60 * arguments.minutes:
                break
            row = examine(case, arguments.sparsity, fresh, deep=not arguments.shallow)
            rows[case.name] = row
            if arguments.rows:
                with arguments.rows.open("a") as file:
                    print(row, file=file)
    result = [rows[case.name] for case in cases if case.name in rows]
    print(HEADER, *result, "", summary(result), sep="\n")


def _is_open(row: Row | None, *, deep: bool) -> bool:
    """Whether an architecture is still to be examined."""
    return row is None or (
        deep and row.result == "supported" and "–" in (row.gates, row.importances)
    )


if __name__ == "__main__":
    main()
