"""Whether shrunk models compile and export, family by family, and what shrinking ResNet-50 takes.

    python -m tests.benchmarks.workflows compiled [--only NAME] [--rows FILE] [--minutes 3]
    python -m tests.benchmarks.workflows resnet50 [--rounds 5]

The first shrinks one architecture of each family of ``architectures.py`` by 30 % of its units, runs
it through ``torch.compile`` and compares the outputs, and exports it to ONNX. Where one fails, the
whole model is tried: "the whole one fails too" says that this is none of the cutting's doing.
Decoders generate twice, with a cache and without one, which must give the same tokens, and a head
that shares its weight with the embedding must still do so. ``--rows`` goes on from the rows of a
file, for so many minutes of CPU time. The second shrinks torchvision's
ResNet-50 on an image of 224 pixels by half of its units, and lets torch-pruning do the same,
alternating in one process: CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
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
from tests.benchmarks.coverage_depth import outputs, short
from torchprune_bayes.errors import TorchPruneBayesError
from torchprune_bayes.structured import L1FilterImportance, shrink

FAMILIES = (
    *(f"transformers {name}" for name in (
        "Llama", "Qwen2", "GPT2", "Gemma", "Gemma2", "Phi", "Phi3", "GPTNeoX", "GPTJ", "OPT",
        "Bloom", "Falcon", "StableLm", "Cohere", "Olmo2", "Granite", "Mixtral", "Qwen2Moe", "Mamba",
        "Bert", "DistilBert", "Electra", "DebertaV2", "MPNet", "ModernBert", "Albert", "ViT",
        "Dinov2", "Beit", "Swin", "Swinv2", "Segformer", "ConvNext", "ResNet", "MobileViT", "T5",
        "Bart", "Whisper", "CLIP", "Siglip", "Detr", "Wav2Vec2",
    )),
    *(f"timm {name}" for name in (
        "resnet18", "efficientnet_b0", "regnety_002", "convnext_atto", "vit_tiny_patch16_224",
        "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "levit_128s", "mixer_s16_224",
        "poolformer_s12", "mobilevit_xxs",
    )),
    *(f"torchvision {name}" for name in (
        "resnet18", "densenet121", "shufflenet_v2_x0_5", "googlenet", "mobilenet_v3_small",
        "vit_b_16", "fcn_resnet50", "fcos_resnet50_fpn",
    )),
    "torch TransformerEncoderLayer", "torch TransformerEncoder", "torch LSTM, 1 layers",
    "torch GRU, 1 layers",
)  # fmt: skip
"""One architecture for each way of wiring."""


HEADER = "| architecture | torch.compile | ONNX | generate | tied head |\n|---|---|---|---|---|"


def compiled(case: Architecture) -> str:
    """A row: whether an architecture compiles, exports and generates when it is shrunk."""
    torch.manual_seed(0)
    whole = case.build().eval()
    model, inputs = copy.deepcopy(whole), _inputs(case)
    try:
        shrink(model, case.inputs(2), L1FilterImportance(), sparsity=0.3, target="channels")
    except TorchPruneBayesError as error:
        return f"| {case.name} | refused: {short(error)[:100]} | – | – | – |"
    cells = [_tried(check, model, whole, inputs) for check in (_compiles, _exports)]
    cells.append(_tried(_generates, model, whole, inputs) if case.generates else "–")
    return f"| {case.name} | {' | '.join([*cells, _tied(model, whole)])} |"


def _tied(model: nn.Module, whole: nn.Module) -> str:
    """Whether a head that shares the weight of the embedding still does."""
    shared = [_shares_embedding(each) for each in (whole, model)]
    return "–" if not shared[0] else "yes" if shared[1] else "no"


def _shares_embedding(model: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and head.weight is model.get_input_embeddings().weight  # type: ignore[operator]


def _generates(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise unless the tokens with a cache are those without one."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if "decoder_input_ids" in inputs:
        settings["decoder_start_token_id"] = 1
    given = {"input_ids": inputs["input_ids"], **settings}
    cached, anew = (model.generate(**given, use_cache=cache) for cache in (True, False))  # type: ignore[operator]
    if not torch.equal(cached, anew):
        raise ValueError("other tokens with a cache than without")


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
    reason = _failure(check, model, inputs)
    if reason is None:
        return "yes"
    alone = _failure(check, whole, inputs) is None
    return f"**no**: {reason}" if alone else f"the whole one fails too ({reason})"


def _failure(
    check: Callable[[nn.Module, Mapping[str, Any]], None],
    model: nn.Module,
    inputs: Mapping[str, Any],
) -> str | None:
    torch.compiler.reset()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            check(model, inputs)
    except Exception as error:
        return f"{type(error).__name__}: {_last_line(error)}".replace("|", "/")
    return None


def _last_line(error: Exception) -> str:
    """The last line of a message that says what went wrong, without colours."""
    lines = re.sub(r"\x1b\[\d*m", "", str(error)).strip().splitlines()
    return next((line.strip()[:100] for line in reversed(lines) if "Error" in line), lines[0][:100])


def _compiles(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    expected = outputs(model, inputs)
    result = outputs(torch.compile(model, backend="aot_eager"), inputs)  # type: ignore[arg-type]
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def _exports(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    import onnx

    tensors = (*model.parameters(), *model.buffers())  # tables of indices are written out, too
    entries = sum(tensor.numel() for tensor in tensors)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (), path, kwargs=dict(inputs), dynamo=True, verbose=False)
        loaded = onnx.load(path)
    onnx.checker.check_model(loaded)
    stored = sum(int(torch.tensor(list(t.dims)).prod()) for t in loaded.graph.initializer)
    if stored > 1.5 * entries + 1e5:
        raise ValueError(f"{stored} stored entries for {entries} of the model")


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
    parser.add_argument("--rows", type=Path, help="file that rows are read from and appended to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of CPU time, then stop")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.what == "resnet50":
        print(resnet50(arguments.rounds))
        return
    print(HEADER, *compiled_rows(arguments.only, arguments.rows, arguments.minutes), sep="\n")


def compiled_rows(only: str, file: Path | None, minutes: float) -> list[str]:
    """Rows of all families, those of a file where it has them; new ones are appended to it."""
    lines = file.read_text().splitlines() if file and file.exists() else []
    rows = {line.split("|")[1].strip(): line for line in lines}
    cases = [case for case in architectures() if case.name in FAMILIES and only in case.name]
    for case in cases:
        if case.name in rows or time.process_time() > 60 * minutes:
            continue
        rows[case.name] = compiled(case)
        if file:
            with file.open("a") as opened:
                print(rows[case.name], file=opened)
    return [rows[case.name] for case in cases if case.name in rows]


if __name__ == "__main__":
    main()
