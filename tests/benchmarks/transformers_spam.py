"""SpaM on small transformers and real data, beside training as usual and magnitude.

    python -m tests.benchmarks.transformers_spam --data ../shared/data
    python -m tests.benchmarks.transformers_spam --only gpt2 --priors map diag --seeds 1

Random initial weights, Adam, sizes for a processor: a DistilBERT of two layers that classifies the
sentences of SST-2 by words, a GPT-2 of two layers on the characters of Tiny Shakespeare, a vision
transformer of three layers on images of CIFAR-10. The prior is updated at some of the rounds that
training is cut into; ``map`` is the same training with the prior precision held at one. The weights
of all linear layers are pruned together, once, without fine-tuning. ``before`` is the log marginal
likelihood per sample of the final weights with prior precision one, ``evidence`` that with the
precisions of training, ``best`` that with the best ones at these weights. Accuracy and expected
calibration error in percent, NLL in nats per label; perplexity is its exponential.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from tests.references.resnet20 import load_cifar10
from torchprune_bayes import Calibration, bake, prunable_parameters, prune_global
from torchprune_bayes.curvature import trainable_parameters
from torchprune_bayes.laplace import Posterior, PriorPrecision
from torchprune_bayes.reports import ResultsTable, evaluate
from torchprune_bayes.training import SpaM

Batch = dict[str, Tensor] | tuple[Tensor, Tensor]
PRIORS = ["map", "unitwise", "diag"]
_WORDS, _LENGTH = 4000, 32
_BLOCK = 64
_ROUNDS, _BURN_IN = 16, 7


@dataclass(frozen=True)
class Task:
    """A model to be trained and its data.

    Attributes:
        build: Makes the model.
        train: Samples to train on.
        test: Samples to measure with.
        steps: Steps of training.
        batch: Samples of a step.
        kind: Curvature: exact where there are few classes.
        samples: How many of them a curvature is fitted to.
        labels: Labels of a sample.
        forward: Logits and labels of a batch; default those of a classifier.
    """

    build: Callable[[], nn.Module]
    train: Batch
    test: Batch
    steps: int
    batch: int
    kind: str
    samples: int
    labels: int = 1
    forward: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] | None = None

    @property
    def size(self) -> int:
        """Samples to train on."""
        return len(_tensors(self.train)[0])


def sentences(folder: Path, images: int) -> Task:
    """SST-2, whose words are numbered by how often they are used."""
    parts = [_read_table(folder / "sst2" / f"{name}.tsv") for name in ("train", "dev")]
    counts = Counter(word for text, _ in parts[0] for word in text.split())
    number = {word: i for i, (word, _) in enumerate(counts.most_common(_WORDS - 2), start=2)}
    train, test = (_encoded(part, number) for part in parts)
    config = DistilBertConfig(
        vocab_size=_WORDS,
        max_position_embeddings=_LENGTH,
        n_layers=2,
        n_heads=4,
        dim=64,
        hidden_dim=256,
    )
    build = partial(DistilBertForSequenceClassification, config)
    return Task(build, train, test, 800, 64, "ggn", 2000)


def characters(folder: Path, images: int) -> Task:
    """Tiny Shakespeare, whose last tenth is held out."""
    text = (folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([number[character] for character in text])
    blocks = ids[: len(ids) // _BLOCK * _BLOCK].view(-1, _BLOCK)
    cut = len(blocks) * 9 // 10
    train, test = ({"input_ids": part, "labels": part} for part in (blocks[:cut], blocks[cut:]))
    config = GPT2Config(
        vocab_size=len(number),
        n_positions=_BLOCK,
        n_embd=96,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    build = partial(GPT2LMHeadModel, config)
    return Task(build, train, test, 800, 32, "monte_carlo", 2000, _BLOCK - 1, _shifted)


def pictures(folder: Path, images: int) -> Task:
    """CIFAR-10, as compressed once more."""
    train = load_cifar10(folder, "train", images)
    test = load_cifar10(folder, "test", 2000)
    build = partial(
        timm.create_model,
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=64,
        depth=3,
        num_heads=4,
        num_classes=10,
    )
    return Task(build, train, test, 800, 64, "ggn", 1000)


TASKS = {"distilbert": sentences, "gpt2": characters, "vit": pictures}


def main() -> None:
    """Print the table and write it as JSON, after every model."""
    arguments = _parser().parse_args()
    table = ResultsTable()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in arguments.only:
            task = TASKS[name](arguments.data, arguments.images)
            for prior in arguments.priors:
                add_model(table, name, task, prior, seed, arguments, device)
                table.to_json(arguments.output)
    keys = ["task", "prior", "criterion", "sparsity"]
    print(table.summarise(keys, ["accuracy", "nll", "ece", "evidence"]).to_text())


def add_model(
    table: ResultsTable,
    name: str,
    task: Task,
    prior: str,
    seed: int,
    arguments: argparse.Namespace,
    device: torch.device,
) -> None:
    """Train one model and add a row for each way of pruning it."""
    torch.manual_seed(seed)
    model, start = task.build().to(device), time.process_time()
    posterior = trained(model, task, prior, arguments)
    row: dict[str, Any] = {
        "task": name,
        "prior": prior,
        "seed": seed,
        "seconds": time.process_time() - start,
    }
    row |= evidences(posterior, task.size)
    cases = [("none", 0.0)]
    cases += [(c, s) for c in arguments.criteria for s in arguments.sparsities]
    print(f"{name} {prior} seed {seed}:", {k: v for k, v in row.items() if type(v) is float})
    for criterion, sparsity in cases:
        pruned = _pruned(model, posterior, criterion, sparsity)
        found = asdict(evaluate(pruned, _batches(task.test, 256), forward=task.forward))
        measures = {
            key: found[key] * (100 if key in ("accuracy", "ece") else 1) for key in _MEASURES
        }
        table.add(**row, criterion=criterion, sparsity=sparsity, **measures)
        print(
            f"{name:10} {prior:8} {criterion:9} {sparsity:.2f}: {measures['accuracy']:.2f}, "
            f"NLL {measures['nll']:.3f}, perplexity {math.exp(min(measures['nll'], 50)):.2f}, "
            f"ECE {measures['ece']:.2f}",
            flush=True,
        )


_MEASURES = ("accuracy", "nll", "ece", "brier")


def trained(model: nn.Module, task: Task, prior: str, arguments: argparse.Namespace) -> Posterior:
    """Train with that prior structure on all tensors; returns the posterior."""
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.lr)
    steps = arguments.steps or task.steps
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, steps, pct_start=0.1)
    spam = SpaM(
        optimizer,
        Calibration(
            model,
            Drawn(task.train, 32),
            _loss(task),
            params=trainable_parameters(model),
            num_samples=task.samples,
        ),
        "layerwise" if prior == "map" else prior,
        burn_in=_BURN_IN,
        every=1,
        kind=task.kind,
        num_data=task.size,
        labels_per_sample=task.labels,
        enabled=prior != "map",
    )
    batches = _endless(task.train, task.batch)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        _mean_loss(model, next(batches)).backward()
        optimizer.step()
        rate.step()
        # Not after the last steps: the weights are to settle under the prior that they have.
        if step % (steps // _ROUNDS) == 0 and step < steps * (1 - 1.5 / _ROUNDS):
            spam.step()
    posterior = spam.posterior()
    spam.remove()
    return posterior


def evidences(posterior: Posterior, samples: int) -> dict[str, float]:
    """Log marginal likelihood per sample: with precision one, that of training, and the best."""
    shapes = {name: tuple(mean.shape) for name, mean in posterior.mean.items()}
    device = next(iter(posterior.mean.values())).device
    one = PriorPrecision.constant(shapes, posterior.prior.structure, 1.0, device=device)
    found = {
        "before": posterior.with_prior(one),
        "evidence": posterior,
        "best": posterior.with_best_prior(),
    }
    return {key: one.log_marginal_likelihood() / samples for key, one in found.items()}


class Drawn:
    """Batches in an order that torch's random state decides."""

    def __init__(self, data: Batch, size: int) -> None:
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[Batch]:
        """Go through the data once."""
        for chosen in torch.randperm(len(_tensors(self.data)[0])).split(self.size):
            yield _at(self.data, chosen)


def _pruned(model: nn.Module, posterior: Posterior, criterion: str, sparsity: float) -> nn.Module:
    pruned = copy.deepcopy(model)
    if criterion == "none":
        return pruned
    options = {"posterior": posterior, "model": pruned} if criterion == "opd" else {}
    prune_global(prunable_parameters(pruned), criterion, amount=sparsity, **options)
    return bake(pruned)


def _loss(task: Task) -> Callable[..., Tensor] | None:
    return None if isinstance(task.train, dict) else cross_entropy


def _mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    if isinstance(batch, dict):
        return model(**{key: value.to(device) for key, value in batch.items()}).loss
    return cross_entropy(model(batch[0].to(device)), batch[1].to(device))


def _shifted(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(**batch).logits[:, :-1], batch["labels"][:, 1:]


def _tensors(data: Batch) -> list[Tensor]:
    return list(data.values() if isinstance(data, dict) else data)


def _at(data: Batch, chosen: Tensor) -> Batch:
    if isinstance(data, dict):
        return {key: value[chosen] for key, value in data.items()}
    return data[0][chosen], data[1][chosen]


def _batches(data: Batch, size: int) -> Iterator[Batch]:
    for chosen in torch.arange(len(_tensors(data)[0])).split(size):
        yield _at(data, chosen)


def _endless(data: Batch, size: int) -> Iterator[Batch]:
    while True:
        yield from Drawn(data, size)


def _read_table(path: Path) -> list[tuple[str, int]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.rsplit("\t", 1) for line in lines if line]
    return [(text, int(label)) for text, label in rows]


def _encoded(samples: list[tuple[str, int]], number: dict[str, int]) -> dict[str, Tensor]:
    """Numbers of words, 1 for unknown ones and 0 after the end."""
    ids = torch.zeros(len(samples), _LENGTH, dtype=torch.long)
    for row, (text, _) in zip(ids, samples, strict=True):
        words = [number.get(word, 1) for word in text.split()[:_LENGTH]]
        row[: len(words)] = torch.tensor(words)
    labels = torch.tensor([label for _, label in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of data")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=PRIORS)
    parser.add_argument("--criteria", nargs="+", default=["opd", "magnitude"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--steps", type=int, default=0, help="0 for those of the task")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--images", type=int, default=10_000, help="of CIFAR-10, to train on")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/transformers_spam.json"))
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and shows defaults."""


if __name__ == "__main__":
    main()
