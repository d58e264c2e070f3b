"""Writing a pruned model and its report in common formats."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from torchprune_bayes._files import write_whole
from torchprune_bayes.methods import bake, export_masks
from torchprune_bayes.types import Masks


def count_pruned(masks: Masks) -> dict[str, Any]:
    """Count pruned entries, in total and for each tensor.

    Example:
        >>> import torch
        >>> count_pruned({"weight": torch.tensor([[True, False]])})["sparsity"]
        0.5
    """
    counts = {name: (mask.numel(), int((~mask).sum())) for name, mask in masks.items()}
    total, pruned = (sum(column) for column in zip(*counts.values(), strict=True))
    tensors = {
        name: {"shape": list(masks[name].shape), "pruned": count, "sparsity": count / size}
        for name, (size, count) in counts.items()
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


def write_config(arguments: argparse.Namespace) -> Path:
    """Write ``config.yaml``: all resolved options, for ``--config``."""
    path = Path(arguments.output, "config.yaml")
    write_whole(path, lambda draft: draft.write_text(arguments.resolved, encoding="utf-8"))
    return path


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write ``report.json``; numbers that JSON cannot represent become ``null``."""
    path = folder / "report.json"
    plain = _plain({"torchprune_bayes": version("torchprune_bayes"), **report})
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, lambda draft: draft.write_text(text + "\n", encoding="utf-8"))
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
