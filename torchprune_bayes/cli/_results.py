"""Measuring a pruned model and writing what others can read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from torchprune_bayes._files import write_whole
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.calibration._batches import batch_size
from torchprune_bayes.calibration._functional import LossFunction
from torchprune_bayes.methods import bake, export_masks
from torchprune_bayes.reports import evaluate
from torchprune_bayes.types import Masks


def loss_for(batches: Iterable[Any]) -> LossFunction | None:
    """The loss that fits the batches: the model's own for mappings, else by the target's type."""
    return None if isinstance(next(iter(batches), None), Mapping) else supervised_loss


def supervised_loss(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy for integer targets, mean squared error for floating-point ones."""
    prediction = getattr(output, "logits", output)
    if target.is_floating_point():
        return mse_loss(prediction, target)
    return cross_entropy(prediction, target)


def measure(model: nn.Module, batches: Iterable[Any]) -> dict[str, float] | None:
    """Measure a model: classification metrics for one label per sample, else the mean loss.

    Returns:
        Metrics by name, or ``None`` for data without labels.
    """
    labels = _labels(next(iter(batches), None))
    if labels is None:
        return None
    if labels.ndim == 1 and not labels.is_floating_point():
        return asdict(evaluate(model, batches))
    return _mean_loss(model, batches)


def count_pruned(masks: Masks) -> dict[str, Any]:
    """Count what masks prune, in all and tensor by tensor.

    Example:
        >>> count_pruned({"weight": torch.tensor([[True, False]])})["sparsity"]
        0.5
    """
    counts = {name: (mask.numel(), int((~mask).sum())) for name, mask in masks.items()}
    total, pruned = (sum(column) for column in zip(*counts.values(), strict=True))
    tensors = {
        name: {"shape": list(masks[name].shape), "pruned": gone, "sparsity": gone / size}
        for name, (size, gone) in counts.items()
    }
    return {"weights": total, "pruned": pruned, "sparsity": pruned / total, "tensors": tensors}


def save_pruned(model: nn.Module, folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write masks, plain weights with zeros, and the report; the model's pruning is baked in.

    Args:
        model: A pruned model.
        folder: Made if it does not exist; files of the same names are replaced.
        report: Plain values.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    masks, weights = folder / "masks.safetensors", folder / "model.safetensors"
    export_masks(model, masks)
    bake(model)
    save_pretrained = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(folder)
    else:
        write_whole(weights, lambda draft: save_model(model, str(draft)))  # tied tensors once
    return [weights, masks, write_report(folder, report)]


def metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Each metric before and after, and what it was measured on; nothing without labels."""
    if metrics["before"] is None:
        return []
    return [
        *(
            f"{name:>8}  {value:.4f} -> {metrics['after'][name]:.4f}"
            for name, value in metrics["before"].items()
            if name != "samples"
        ),
        f"measured on {metrics['data']}, without fine-tuning",
    ]


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write ``report.json``; numbers that JSON does not have become ``null``."""
    path = folder / "report.json"
    plain = _plain({"torchprune_bayes": version("torchprune_bayes"), **report})
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, lambda draft: draft.write_text(text + "\n", encoding="utf-8"))
    return path


def _labels(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return found if isinstance(found, Tensor) else None


def _mean_loss(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    everything = Calibration(model, batches, loss_for(batches))
    total, samples = 0.0, 0
    with torch.no_grad():
        for batch in everything.batches():
            total += float(everything.loss(None, batch)) * batch_size(batch)
            samples += batch_size(batch)
    return {"loss": total / samples, "samples": samples}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
