"""Gates of four families at their published sizes, folded and cut out: what changes in the output.

Random weights; gates attached by the presets, with random posteriors, about a third of them closed.
Printed are the largest change of the output when they close, relative to the largest output,
parameters, FLOPs, the largest difference between the output with gates and that of the
shrunk model, absolute and relative to the largest output, in float32, and the speed-up over the
whole model without gates.

    python -m tests.benchmarks.bmrs_families [--models resnet18 vit_tiny distilbert gpt2]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.latency import BUILD, inputs_for
from tests.gates.cases import scatter, scatter_norms
from torchprune_bayes.gates import attach_gates, fold_gates
from torchprune_bayes.reports import compare_speed
from torchprune_bayes.structured import shrink
from torchprune_bayes.structured.importances.bmrs import BMRSImportance

HEADER = (
    "| model | gates closed | what that changes | parameters | FLOPs | shrunk, largest difference "
    "| relative | speed-up |\n|---|---|---|---|---|---|---|---|"
)


def resnet18() -> nn.Module:
    import timm

    return timm.create_model("resnet18")


MODELS = {
    "resnet18": resnet18,
    **{name: BUILD[name] for name in ("vit_tiny", "distilbert", "gpt2")},
}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The output, or its logits."""
    output: Any = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def row(name: str, pairs: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    scatter_norms(model)
    inputs = inputs_for("vit_tiny" if name == "resnet18" else name, 1)
    gates = attach_gates(model)
    scatter(gates, closed=False)
    open_output = logits(model, inputs)
    scatter(gates)
    closed, before = gates.closed / gates.units, logits(model, inputs)
    largest = float(before.abs().max())
    acts = float((before - open_output).abs().max()) / largest
    importance = BMRSImportance(gates, criterion=None)
    fold_gates(model)
    whole = copy.deepcopy(model)
    report = shrink(model, inputs, importance, target="evidence")
    difference = float((logits(model, inputs) - before).abs().max())
    speed = compare_speed(whole, model, inputs, pairs=pairs)
    return (
        f"| {name} | {closed:.1%} | {acts:.2f} | {report.parameters} | {report.flops} "
        f"| {difference:.1e} | {difference / largest:.1e} | {speed.speedup:.2f} "
        f"({speed.speedup_low:.2f} to {speed.speedup_high:.2f}) |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(HEADER)
    for name in arguments.models:
        print(row(name, arguments.pairs), flush=True)


if __name__ == "__main__":
    main()
