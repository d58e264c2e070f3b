"""Whether shrunk models compile and export, family by family, and what shrinking ResNet-50 takes.

    python -m tests.benchmarks.workflows compiled [--only NAME]
    python -m tests.benchmarks.workflows resnet50 [--rounds 5]

The first shrinks one architecture of each family of ``architectures.py`` by 30 % of its units, runs
it through ``torch.compile`` and compares the outputs, and exports it to ONNX. Where one fails, the
whole model is tried: "neither" says that it fails as well. The second shrinks torchvision's
ResNet-50 on an image of 224 pixels by half of its units, and lets torch-pruning do the same,
alternating in one process: CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.benchmarks.architectures import Architecture, architectures
from tests.benchmarks.coverage_depth import outputs
from torchprune_bayes.structured import L1FilterImportance, shrink

FAMILIES = (
    *(f"transformers {name}" for name in (
        "Llama", "GPT2", "Gemma2", "Mixtral", "OPT", "GPTNeoX", "Mamba", "Bert", "DebertaV2",
        "ModernBert", "Albert", "ViT", "Swin", "Segformer", "ConvNext", "T5", "Bart", "Whisper",
        "CLIP", "Wav2Vec2",
    )),
    *(f"timm {name}" for name in (
        "resnet18", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224", "levit_128s",
        "mixer_s16_224",
    )),
    *(f"torchvision {name}" for name in ("densenet121", "shufflenet_v2_x0_5", "fcn_resnet50")),
    "torch TransformerEncoder", "torch LSTM, 1 layers",
)  # fmt: skip
"""One architecture for each way of wiring."""


def compiled(case: Architecture) -> str:
    """A row: whether an architecture compiles and exports when it is shrunk."""
    torch.manual_seed(0)
    whole = case.build().eval()
    model, inputs = copy.deepcopy(whole), _inputs(case)
    shrink(model, case.inputs(2), L1FilterImportance(), sparsity=0.3, target="channels")
    cells = [_tried(check, model, whole, inputs) for check in (_compiles, _exports)]
    return f"| {case.name} | {' | '.join(cells)} |"


def _inputs(case: Architecture) -> Mapping[str, Any]:
    """Inputs without a cache, which no exporter takes as an output."""
    inputs = dict(case.inputs(2))
    return {**inputs, "use_cache": False} if case.generates else inputs


def _tried(
    check: Callable[[nn.Module, Mapping[str, Any]], None],
    model: nn.Module,
    whole: nn.Module,
    inputs: Mapping[str, Any],
) -> str:
    for each, verdict in ((model, "yes"), (whole, "no, the whole model does")):
        torch.compiler.reset()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                check(each, inputs)
        except Exception as error:
            reason = f"{type(error).__name__}: {_last_line(error)}"
            continue
        return verdict
    return f"neither ({reason})".replace("|", "/")


def _last_line(error: Exception) -> str:
    """The last line of a message that says what went wrong, without colours."""
    lines = re.sub(r"\x1b\[\d*m", "", str(error)).strip().splitlines()
    return next((line.strip()[:100] for line in reversed(lines) if "Error" in line), lines[0][:100])


def _compiles(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    expected = outputs(model, inputs)
    found = outputs(torch.compile(model, backend="aot_eager"), inputs)  # type: ignore[arg-type]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def _exports(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    import onnx

    entries = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (), path, kwargs=dict(inputs), dynamo=True, verbose=False)
        loaded = onnx.load(path)
    onnx.checker.check_model(loaded)
    stored = sum(int(torch.tensor(list(t.dims)).prod()) for t in loaded.graph.initializer)
    if stored > 1.5 * entries + 1e5:
        raise ValueError(f"{stored} stored entries for {entries} parameters")


def resnet50(rounds: int) -> str:
    """Median CPU seconds of this library's ``shrink`` and of torch-pruning's pruner."""
    import torch_pruning as tp
    import torchvision

    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def ours(model: nn.Module, *, verify: bool = True) -> None:
        importance = L1FilterImportance()
        shrink(model, x, importance, sparsity=0.5, target="channels", verify=verify)

    def theirs(model: Any) -> None:
        tp.pruner.BasePruner(
            model,
            x,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.5,
            global_pruning=True,
            ignored_layers=[model.fc],
        ).step()

    ways: dict[str, Callable[[nn.Module], None]] = {
        "shrink": ours,
        "shrink(verify=False)": partial(ours, verify=False),
        "torch-pruning": theirs,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, cut in ways.items():
            model = torchvision.models.resnet50().eval()
            start = time.process_time()
            cut(model)
            taken[name].append(time.process_time() - start)
    lines = []
    for name, seconds in taken.items():
        ratios = [a / b for a, b in zip(seconds, taken["torch-pruning"], strict=True)]
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} | {statistics.median(ratios):.1f} "
            f"({spread}) |"
        )
    return "\n".join(["| | CPU s | times torch-pruning's |", "|---|---|---|", *lines])


def main() -> None:
    """Print a table or a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("compiled", "resnet50"))
    parser.add_argument("--only", default="", help="part of an architecture's name")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.what == "resnet50":
        print(resnet50(arguments.rounds))
        return
    print("| architecture | torch.compile | ONNX |\n|---|---|---|", flush=True)
    for case in architectures():
        if case.name in FAMILIES and arguments.only in case.name:
            print(compiled(case), flush=True)


if __name__ == "__main__":
    main()
