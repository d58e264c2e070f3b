"""Which architectures shrink, checked end to end; or why not, in one sentence.

    python -m tests.benchmarks.coverage [--only NAME] [--share 1/3] [--sparsity 0.3]

For every architecture of ``architectures.py``, with random weights moved off their start: channels,
hidden units and heads go until the asked share is gone, those with the smallest L1 norm. Then the
shrunk model in double precision is compared with the whole one in which the same units are zero, a
backward pass in training mode must reach the cut weights, decoders must generate the same tokens
with a cache as the masked ones, and the model must come back from a folder bit for bit. Prints a
Markdown table and a line of totals. ``--share 1/3`` takes a third, another one every day.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from tests.benchmarks.architectures import Architecture, Inputs, architectures
from torchprune_bayes.errors import TorchPruneBayesError
from torchprune_bayes.structured import (
    L1FilterImportance,
    ShrinkReport,
    load_shrunk,
    save_shrunk,
    shrink,
    zero_units,
)
from torchprune_bayes.wiring._forward import run, tensors_in

TOLERANCES = {"double": 1e-9, "partly single": 1e-5}
"""Largest difference, relative to the largest output, that can be rounding: in double precision,
and in models that compute a part in single precision whatever their type."""


class WrongError(Exception):
    """A check that failed."""


@dataclass(frozen=True)
class Row:
    """What was found for an architecture.

    Attributes:
        name: The architecture.
        verdict: ``"served"``, ``"refused"``, ``"wrong"`` or ``"raw"``.
        detail: Groups and what was left whole, or the reason.
        difference: Largest difference in double precision, relative to the largest output.
        seconds: CPU time of shrinking, its own checks included.
    """

    name: str
    verdict: str
    detail: str
    difference: float | None
    seconds: float

    def __str__(self) -> str:
        difference = "–" if self.difference is None else f"{self.difference:.0e}"
        return (
            f"| {self.name} | {self.verdict} | {self.detail} | {difference} | {self.seconds:.1f} |"
        )


HEADER = (
    "| architecture | verdict | groups, or why not | difference | CPU s |\n|---|---|---|---|---|"
)


def examine(case: Architecture, sparsity: float) -> Row:
    """Shrink one architecture and check everything."""
    torch.manual_seed(0)
    model = case.build().eval()
    inputs = case.inputs(2)
    _stir(model)
    twin = copy.deepcopy(model)
    start = time.process_time()
    try:
        report = shrink(model, inputs, L1FilterImportance(), sparsity=sparsity, target="channels")
    except TorchPruneBayesError as error:
        return Row(case.name, "refused", _short(error), None, time.process_time() - start)
    except Exception as error:
        return Row(case.name, "raw", f"{type(error).__name__}: {_short(error)}", None, 0.0)
    seconds = time.process_time() - start
    difference = None
    try:
        if report.units.sparsity < sparsity:
            raise WrongError(f"{report.units.sparsity:.2f} of the units are gone")
        difference = _checked(case, model, twin, report)
    except WrongError as error:
        return Row(case.name, "wrong", str(error), difference, seconds)
    except Exception as error:
        return Row(case.name, "raw", f"{type(error).__name__}: {_short(error)}", None, seconds)
    return Row(case.name, "served", _groups(report), difference, seconds)


def _stir(model: nn.Module) -> None:
    """Move every vector, so that no channel hides behind a zero bias or a tiny layer scale."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.add_(0.1 * torch.randn_like(parameter))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:150].replace("|", "/")


def _groups(report: ShrinkReport) -> str:
    kinds = Counter(group.kind for group in report.groups)
    found = ", ".join(f"{count} of {kind}s" for kind, count in kinds.items())
    left = f"; {len(report.left_out)} left whole" if report.left_out else ""
    return f"{found.replace('hiddens', 'hidden units')}{left}"


def _checked(
    case: Architecture, model: nn.Module, twin: nn.Module, report: ShrinkReport
) -> float | None:
    zero_units(twin, report.plan)
    difference = _difference(case, model, twin)
    if _trains(case, twin):
        _train(case, model, report)
    if case.generates:
        _generate(case, model, twin)
    with tempfile.TemporaryDirectory() as folder:
        save_shrunk(model, folder)
        fresh = load_shrunk(case.build().eval(), folder).state_dict()
    state = model.state_dict()
    if not all(torch.equal(fresh[name], value) for name, value in state.items()):
        raise WrongError("it comes back from a folder with other weights")
    return difference


def _difference(case: Architecture, model: nn.Module, twin: nn.Module) -> float | None:
    """Compare in double precision where the model runs in it."""
    pair = [copy.deepcopy(each).double() for each in (model, twin)]
    inputs = {key: _double(value) for key, value in case.inputs(2).items()}
    with torch.no_grad():
        try:
            outputs = [_outputs(each, inputs) for each in pair]
        except RuntimeError:  # a part of it names single precision
            outputs = [_outputs(each, case.inputs(2)) for each in (model, twin)]
    found = 0.0
    for one, other in zip(*outputs, strict=True):
        if one.shape != other.shape:
            raise WrongError(
                f"outputs of shape {tuple(one.shape)} in place of {tuple(other.shape)}"
            )
        if one.numel():
            scale = float(other.abs().max()) or 1.0
            found = max(found, float((one - other).abs().max()) / scale)
    if found > TOLERANCES["partly single"]:
        raise WrongError(f"outputs differ by {found:.1g} of the largest")
    return found


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(0)  # some draw masks
    return tensors_in(run(model, inputs))


def _double(value: object) -> object:
    if isinstance(value, list):
        return [_double(each) for each in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


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
    """Count verdicts, and name the slowest."""
    counts = Counter(row.verdict for row in rows)
    slowest = max(rows, key=lambda row: row.seconds)
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return (
        f"{len(rows)} architectures: {found}; slowest {slowest.name}, {slowest.seconds:.1f} CPU s"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of an architecture's name")
    parser.add_argument("--share", type=Fraction, default=Fraction(1), help="such as 1/3")
    parser.add_argument("--sparsity", type=float, default=0.3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(HEADER, flush=True)
    rows = []
    for case in chosen(arguments.only, arguments.share, datetime.date.today().toordinal()):
        with contextlib.redirect_stderr(None):
            rows.append(examine(case, arguments.sparsity))
        print(rows[-1], flush=True)
    print(f"\n{summary(rows)}")


if __name__ == "__main__":
    main()
