"""Latency and memory before and after shrinking, as ratios within one run.

    python -m tests.benchmarks.latency [--models resnet50 gpt2] [--batch 1 4] [--sparsity 0.5]

Architectures at their published sizes with random weights, 224 x 224 images or 128 tokens, one
thread. Channels, hidden units and heads with the smallest L1 norm go until the sparsity in
parameters is reached, the same fraction of every group. Dense and shrunk model are timed in turn,
so that whatever else the machine does falls on both. Prints a Markdown table: parameters, FLOPs,
median time of a forward pass, the median and the range of the ratios of neighbouring pairs, and
two kinds of memory: that of the weights, and the most that a forward pass holds beyond them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from torchprune_bayes.reports import compare_speed
from torchprune_bayes.structured import L1FilterImportance, UnitCosts, find_groups, shrink

TOKENS = 128
HEADER = (
    "| model | batch | parameters (M) | GFLOPs | ms | speed-up (pairs) | weights (MB) "
    "| activations at peak (MB) |\n|---|---|---|---|---|---|---|---|"
)


def resnet50() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50()


def vit_tiny() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224")


def distilbert() -> nn.Module:
    import transformers

    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig())


def gpt2() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


BUILD: dict[str, Callable[[], nn.Module]] = {
    "resnet50": resnet50,
    "vit_tiny": vit_tiny,
    "distilbert": distilbert,
    "gpt2": gpt2,
}


def inputs_for(name: str, batch: int) -> dict[str, Tensor]:
    """What a model is called with."""
    generator = torch.Generator().manual_seed(0)
    if name in ("resnet50", "vit_tiny"):
        return {"x": torch.randn(batch, 3, 224, 224, generator=generator)}
    return {"input_ids": torch.randint(1, 30000, (batch, TOKENS), generator=generator)}


def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """One pass, keeping nothing."""
    with torch.inference_mode():
        return model(**inputs)


def activation_peak(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """The most bytes that one pass holds at one time, by the allocations it makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        forward(model, inputs)
    assert run.profiler is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def shrunk(model: nn.Module, inputs: Mapping[str, Tensor], sparsity: float) -> nn.Module:
    """A shrunk copy."""
    small = copy.deepcopy(model)
    shrink(small, inputs, L1FilterImportance(), sparsity=sparsity, allocation="layer")
    return small


def measure(name: str, dense: nn.Module, small: nn.Module, batch: int, repetitions: int) -> str:
    """One row."""
    inputs = inputs_for(name, batch)
    both = (dense, small)
    speed = compare_speed(dense, small, inputs, pairs=repetitions)
    costs = [UnitCosts.measure(model, find_groups(model, inputs), inputs) for model in both]
    sizes = [cost.parameters({}) / 1e6 for cost in costs]
    flops = [cost.flops({}) / 1e9 for cost in costs]
    held = [sum(p.nbytes for p in model.parameters()) / 2**20 for model in both]
    peaks = [activation_peak(model, inputs) / 2**20 for model in both]
    return (
        f"| {name} | {batch} | {_pair(sizes, 1)} | {_pair(flops, 1)} "
        f"| {speed.milliseconds_before:.0f} → {speed.milliseconds_after:.0f} "
        f"| **{speed.speedup:.2f}** "
        f"({speed.speedup_low:.2f}–{speed.speedup_high:.2f}) | {_pair(held, 0)} "
        f"| {_pair(peaks, 1)} |"
    )


def _pair(values: list[float], digits: int) -> str:
    before, after = values
    return f"{before:.{digits}f} → {after:.{digits}f} ({before / after:.2f}×)"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=BUILD, default=[*BUILD])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--sparsity", type=float, default=0.5, help="of the parameters")
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(HEADER)
    for name in arguments.models:
        dense = BUILD[name]().eval()
        small = shrunk(dense, inputs_for(name, 1), arguments.sparsity)
        for batch in arguments.batch:
            print(measure(name, dense, small, batch, arguments.repetitions), flush=True)


if __name__ == "__main__":
    main()
