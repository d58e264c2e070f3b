"""The state of a pruner beside a checkpoint: one safetensors file, and a record to verify it.

In plain words: weights and masks are saved by different code, so they may not match. The record
holds a fingerprint of the masks; on restoring it is compared with the masks found, and the masks
with the zeros in the weights, before training continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from torchprune_bayes._files import read_tensors, save_tensors
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.training import GradualPruner
from torchprune_bayes.types import Masks

MASK_FILE = "pruning_masks.safetensors"


def fingerprint(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and entries of boolean masks, whatever their order and device.

    Example:
        >>> masks = {"a": torch.tensor([True]), "b": torch.tensor([False])}
        >>> fingerprint(masks) == fingerprint(dict(reversed(masks.items())))
        True
    """
    plain = {name: masks[name].detach().to("cpu", torch.bool).contiguous() for name in masks}
    return hashlib.sha256(save(plain)).hexdigest()


def record_of(pruner: GradualPruner) -> dict[str, Any]:
    """JSON record of a pruner: step, history, sparsity, fingerprint of its masks."""
    state = pruner.state_dict()
    return {
        "step": state["step"],
        "history": state["history"],
        "sparsity": pruner.sparsity,
        "masks": sorted(state["masks"]),
        "sha256": fingerprint(state["masks"]),
        "frozen": frozen_fingerprint(pruner.space, state["masks"]),
    }


def frozen_fingerprint(space: ParameterSpace, masks: Mapping[str, Tensor]) -> str | None:
    """SHA-256 of the frozen weights under ``masks``, which checkpoints of adapters do not hold.

    ``None`` if no weight is frozen.
    """
    values = {
        tensor.name: (tensor.value + 0.0).to("cpu").contiguous()  # no negative zeros
        for tensor in space.with_masks(masks)
        if not tensor.leaf.requires_grad
    }
    return hashlib.sha256(save(values)).hexdigest() if values else None


def check_frozen(space: ParameterSpace, masks: Masks, record: Mapping[str, Any]) -> None:
    """Refuse frozen weights that differ from those of the record under its masks.

    Raises:
        AlignmentError: In this case.
    """
    if record.get("frozen") not in (None, frozen_fingerprint(space, masks)):
        raise AlignmentError(
            "Expected the frozen weights of the checkpoint, got different ones: a "
            "checkpoint of adapters does not hold them, so load the same ones first."
        )


def save_pruner(pruner: GradualPruner, path: str | Path) -> None:
    """Write masks, step and history as one safetensors file; the file is complete or absent."""
    masks = pruner.state_dict()["masks"]
    save_tensors(path, masks, {"pruner": json.dumps(record_of(pruner))})


def read_pruner(path: str | Path) -> tuple[dict[str, Any], Masks]:
    """Read the record and the masks that :func:`save_pruner` wrote.

    Raises:
        ArgumentError: If the file cannot be read or is of another kind, or its masks differ from
            its record.
    """
    stored = read_tensors(path, "masks of a pruner")
    if "pruner" not in stored.metadata:
        raise ArgumentError(f"Expected masks of a pruner in {path}, got a file without its record.")
    record: dict[str, Any] = stored.json("pruner", dict)
    masks = dict(stored.tensors)
    if record.get("sha256") != fingerprint(masks):
        raise ArgumentError(f"Expected the masks of the record in {path}, got different ones.")
    return record, masks


def state_from(record: Mapping[str, Any], masks: Masks) -> dict[str, Any]:
    """The state for ``GradualPruner.load_state_dict``."""
    return {"step": record["step"], "history": record["history"], "masks": masks}


def zeros_as_masks(space: ParameterSpace, names: list[str]) -> Masks:
    """Masks of the tensors ``names`` that count every exact zero as pruned."""
    return {tensor.name: tensor.leaf.detach() != 0 for tensor in space.subset(names)}


def check_zeros(space: ParameterSpace, masks: Masks) -> None:
    """Refuse weights that are not zero where the masks prune.

    Raises:
        AlignmentError: If there are any: weights and masks are of different checkpoints.
    """
    revived = {
        tensor.name: int(
            (tensor.leaf.detach()[~masks[tensor.name].to(tensor.leaf.device)]).count_nonzero()
        )
        for tensor in space.subset(masks)
    }
    wrong = {name: count for name, count in revived.items() if count}
    if wrong:
        name, count = next(iter(wrong.items()))
        raise AlignmentError(
            f"Expected zeros where the masks prune, got {sum(wrong.values())} other weights in "
            f"{len(wrong)} tensors ({count} in `{name}`): weights and masks are of different "
            "checkpoints."
        )
