"""What pruning costs on networks of ten million weights and more, in training passes.

    python -m tests.benchmarks.real_size resnet18 --samples 16 64 256
    python -m tests.benchmarks.real_size resnet50 gpt2 --samples 64
    python -m tests.benchmarks.real_size encoder --samples 128 --mini-batch 8
    python -m tests.benchmarks.real_size gpt2 --samples 64 --mini-batch 4 --bfloat16 --offload DIR

Random weights and data, of which cost does not depend much; one thread; ``woodfisher`` with
everything at its default. A training pass is forward and backward over the same samples in batches
of 32, measured before and after in the same process, the smaller one counts. Memory is the peak of
the process above that after the training passes, so without the model, and without what is mapped
from files, such as gradients in a scratch folder (Linux alone); run one cell per process.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration, prunable_parameters, prune_global

_LONG = 60.0  # seconds; a pass of that length is measured twice instead of three times

Case = tuple[nn.Module, Any, Tensor, Callable[[Any, Tensor], Tensor]]


def resnet18(samples: int) -> Case:
    """11.2 M weights, images of 32 pixels, a stem without pooling."""
    import timm

    model: Any = timm.create_model("resnet18", num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model, torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,)), cross_entropy


def resnet50(samples: int) -> Case:
    """25.6 M weights, images of 224 pixels."""
    import timm

    model = timm.create_model("resnet50")
    return model, torch.randn(samples, 3, 224, 224), torch.randint(1000, (samples,)), cross_entropy


def encoder(samples: int) -> Case:
    """The size of MiniLM, 10.6 M weights in linear layers, sentences of 32 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = BertForSequenceClassification(config)
    ids = torch.randint(1000, (samples, 32))
    return model, {"input_ids": ids}, torch.randint(2, (samples,)), _of_logits


def gpt2(samples: int) -> Case:
    """124 M weights, 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = torch.randint(50257, (samples, 128))
    return GPT2LMHeadModel(GPT2Config()), {"input_ids": ids}, ids, _of_next_tokens


def _of_logits(output: Any, target: Tensor) -> Tensor:
    return cross_entropy(getattr(output, "logits", output), target)


def _of_next_tokens(output: Any, target: Tensor) -> Tensor:
    logits = getattr(output, "logits", output)
    return cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())


CASES = {"resnet18": resnet18, "resnet50": resnet50, "encoder": encoder, "gpt2": gpt2}


def measure(name: str, samples: int, sampling: dict[str, Any], method: str, sparsity: float) -> str:
    """One row: what the call cost beside training passes over the same samples."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, inputs, target, loss_fn = CASES[name](2 * samples)  # as many to hold out
    model.eval()
    peak = PeakMemory()
    before = _training_pass(model, inputs, target, loss_fn, samples)
    if before < _LONG:
        before = min(before, _training_pass(model, inputs, target, loss_fn, samples))
    params, start = prunable_parameters(model), peak.mib()
    calibration = Calibration(
        model, [(inputs, target)], loss_fn, params, num_samples=samples, **sampling
    )
    began = time.process_time()
    decision = prune_global(params, method, amount=sparsity, calibration=calibration)
    seconds = time.process_time() - began
    memory = peak.mib() - start
    one = min(before, _training_pass(model, inputs, target, loss_fn, samples))
    step = decision.info["steps"][-1]
    weights = sum(getattr(module, leaf).numel() for module, leaf in params)
    return (
        f"| {name} | {weights / 1e6:.1f} M | {samples} | {calibration.num_gradients} | "
        f"{seconds / one:.1f} | {seconds:.1f} | "
        f"{one:.2f} | {memory:.0f} | {calibration.engine} | {step['block_size']} |"
    )


def _training_pass(
    model: nn.Module, inputs: Any, target: Tensor, loss_fn: Any, samples: int
) -> float:
    began = time.process_time()
    for start in range(0, samples, 32):
        part = slice(start, min(start + 32, samples))
        if isinstance(inputs, dict):
            output = model(**{key: value[part] for key, value in inputs.items()})
        else:
            output = model(inputs[part])
        loss_fn(output, target[part]).backward()
    model.zero_grad()
    return time.process_time() - began


class PeakMemory:
    """The largest memory of this process that is no file's, looked at ten times a second."""

    def __init__(self) -> None:
        self._peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def mib(self) -> float:
        """The largest so far; where the system does not say, that with files."""
        self._look()
        return self._peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def _watch(self) -> None:
        while self._look():
            time.sleep(0.1)

    def _look(self) -> bool:
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        except OSError:
            return False
        kib = next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
        self._peak = max(self._peak, kib / 1024)
        return kib > 0


def main() -> None:
    """Measure each cell in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--samples", nargs="+", type=int, default=[64])
    parser.add_argument("--mini-batch", type=int, default=1, help="samples per gradient")
    parser.add_argument("--bfloat16", action="store_true", help="dtype of stored gradients")
    parser.add_argument("--offload", default="auto", help="where gradients are stored")
    parser.add_argument("--method", default="woodfisher")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--here", action="store_true", help="in this process: one cell alone")
    args = parser.parse_args()
    if args.here:
        sampling: dict[str, Any] = {"mini_batch": args.mini_batch, "offload": args.offload}
        if args.bfloat16:
            sampling["gradient_dtype"] = torch.bfloat16
        row = measure(args.cases[0], args.samples[0], sampling, args.method, args.sparsity)
        print(row, flush=True)
        return
    head = ["network", "weights", "samples", "gradients", "passes", "CPU s", "one pass, s"]
    head += ["MiB", "engine", "blocks"]
    print(f"| {' | '.join(head)} |")
    print(f"|{'---|' * len(head)}", flush=True)
    for name in args.cases:
        for samples in args.samples:
            cell = [name, "--samples", str(samples), "--here"]
            options = ["--method", args.method, "--sparsity", str(args.sparsity)]
            options += ["--mini-batch", str(args.mini_batch), "--offload", args.offload]
            options += ["--bfloat16"] if args.bfloat16 else []
            subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.real_size", *cell, *options], check=True
            )


if __name__ == "__main__":
    main()
