"""What ``transformers.py`` measures of a pruned network, and how it compares two methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.benchmarks.transformers_tasks import Data, part_of

PEER = "sparsegpt"


@torch.no_grad()
def measured(model: nn.Module, data: Data, samples: int) -> dict[str, Any]:
    """Mean negative log-likelihood with its standard error over samples, and ``losses`` of each.

    A sample is a sentence, an image or a block of text, whose loss is the mean over its tokens.
    """
    model.eval()
    right = 0.0
    losses: list[float] = []
    number = min(samples or len(data["labels"]), len(data["labels"]))
    for start in range(0, number, 128):
        batch = part_of(data, slice(start, min(start + 128, number)))
        logits, labels = model(**batch).logits, batch["labels"]
        if logits.ndim == 2:
            right += float((logits.argmax(1) == labels).sum())
        else:
            logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
        losses += each.reshape(len(each), -1).mean(1).tolist()
    values = torch.tensor(losses)
    nll = float(values.mean())
    found = {"nll": nll, "standard_error": float(values.std()) / number**0.5, "losses": losses}
    if data["labels"].ndim > 1:
        return found | {"perplexity": float(torch.tensor(nll).exp())}
    return found | {"accuracy": 100 * right / number}


@torch.no_grad()
def divergence(dense: nn.Module, model: nn.Module, data: Data, samples: int) -> float:
    """Mean Kullback-Leibler divergence of the outputs from those of the dense network, in nats."""
    total, number = 0.0, min(samples or len(data["labels"]), len(data["labels"]))
    for start in range(0, number, 64):
        batch = part_of(data, slice(start, min(start + 64, number)))
        wanted, found = (net.eval()(**batch).logits.log_softmax(-1) for net in (dense, model))
        each = (wanted.exp() * (wanted - found)).sum(-1)
        total += float(each.mean()) * len(each)
    return total / number


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """NLL of each method minus SparseGPT's with the same calibration samples, sample by sample.

    Differences of a sample are averaged over the seeds; the standard error is over the samples.
    """
    lines = []
    found = {(row["sparsity"], row["method"], row["seed"]): row["losses"] for row in rows}
    for sparsity, method in dict.fromkeys((s, m) for s, m, _ in found if m != PEER):
        seeds = [k for s, m, k in found if (s, m) == (sparsity, method)]
        seeds = [k for k in seeds if (sparsity, PEER, k) in found]
        if seeds:
            ours, theirs = (
                torch.tensor([found[sparsity, name, k] for k in seeds]) for name in (method, PEER)
            )
            each = (ours - theirs).mean(0)
            error = float(each.std()) / len(each) ** 0.5
            text = f"{method} minus {PEER}: {float(each.mean()):+.4f}, s.e. {error:.4f}"
            lines.append(f"{sparsity}, seeds {seeds}: {text}")
    return lines


def short(row: dict[str, Any]) -> dict[str, Any]:
    """A row to print: three digits, and no losses of single samples."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
    return {key: value for key, value in rounded.items() if key != "losses"}
