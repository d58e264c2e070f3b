"""Time and memory of one curvature pass beside those of one training pass.

``python -m tests.benchmarks.curvature_cost [--models resnet18 ...] [--device cuda]`` prints, for
networks with random weights, the seconds of a training pass (forward, backward and a step of SGD)
over one batch, those of a curvature pass over the same batch, their ratio, the seconds that the
check of the layers' rules takes once per fit, and the memory that the fit took beyond the model.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from torchprune_bayes.curvature import LayerCurvature

Case = tuple[Callable[[], nn.Module], Callable[[int], Any], int]


def _images(size: int) -> Callable[[int], Any]:
    return lambda n: (torch.randn(n, 3, size, size), torch.randint(10, (n,)))


def _texts(vocabulary: int, length: int, *, labels: bool) -> Callable[[int], Any]:
    def make(n: int) -> dict[str, Tensor]:
        ids = torch.randint(vocabulary, (n, length))
        target = ids.clone() if labels else torch.randint(2, (n,))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target}

    return make


CASES: dict[str, Case] = {
    "resnet18": (lambda: resnet18(num_classes=10), _images(64), 16),
    "resnet18-224": (lambda: resnet18(num_classes=10), _images(224), 4),
    "vit-tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10),
        _images(224),
        4,
    ),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(DistilBertConfig()),
        _texts(30522, 128, labels=False),
        4,
    ),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config()), _texts(50257, 128, labels=True), 2),
}


def _loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        return model(**batch).loss
    return cross_entropy(model(batch[0]), batch[1])


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {key: value.to(device) for key, value in batch.items()}
    return tuple(tensor.to(device) for tensor in batch)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of several runs, because other programs only ever slow one down.

    Processor seconds of all threads on a CPU, so that waiting for other programs does not count.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found = []
    for _ in range(repeats):
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - start)
    return min(found)


def _training_pass(model: nn.Module, batch: Any) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        _loss(model, batch).backward()
        optimizer.step()

    return run


def _peak(device: torch.device) -> float:
    """Largest memory so far, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, structure: Any, kind: Any, device: torch.device, repeats: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    make, batches, samples = CASES[name]
    model, batch = make().to(device), _moved(batches(samples), device)
    loss_fn = None if isinstance(batch, dict) else cross_entropy
    before = _peak(device)

    def fit(times: int, verify: bool) -> None:
        settings = LayerCurvature(kind, structure, batch_size=samples, verify=verify)
        settings.fit_model(model, [batch] * times, loss_fn, num_samples=samples * times)

    fit(1, True)
    memory = _peak(device) - before
    once = _seconds(lambda: fit(1, True), device, repeats)
    curvature = _seconds(lambda: fit(3, True), device, repeats) - once
    checked = once - curvature / 2
    training = _seconds(_training_pass(model.train(), batch), device, repeats + 1)
    return (
        f"| {name} | {kind} | {structure} | {samples} | {training:.3f} | {curvature / 2:.3f} | "
        f"{curvature / 2 / training:.2f} | {checked:.2f} | {memory:.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--structures", nargs="+", default=["diagonal", "kronecker"])
    parser.add_argument("--kind", default="empirical")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| model | kind | structure | batch | training s | curvature s | ratio | once s | GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    device = torch.device(options.device)
    for name in options.models:
        for structure in options.structures:
            print(measure(name, structure, options.kind, device, options.repeats), flush=True)


if __name__ == "__main__":
    main()
