"""Matching masks and weights when a Trainer resumes or loads its best model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import warn

from torchprune_bayes.errors import ArgumentError, TorchPruneBayesWarning
from torchprune_bayes.integrations._checkpoints import (
    MASK_FILE,
    check_frozen,
    check_zeros,
    fingerprint,
    read_pruner,
    state_from,
    zeros_as_masks,
)
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.training import GradualPruner
from torchprune_bayes.types import Masks

RECORD = "torchprune_bayes"
"""Key under which ``trainer_state.json`` keeps step, history and the fingerprint of the masks."""


def checkpoint_folder(args: Any, state: Any) -> Path:
    """Where the Trainer writes its checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def forget_best(state: Any) -> None:
    """Forget a best checkpoint that was made before the weights were pruned."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def resume_folders(args: Any, state: Any) -> list[Path]:
    """Where the resumed checkpoint may be, which callbacks are not told."""
    folders = [checkpoint_folder(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    return folders


def masks_on_record(
    space: ParameterSpace, record: Mapping[str, Any], folders: Sequence[Path]
) -> Masks:
    """The masks whose fingerprint is in the record, from a file or from the zeros in the weights.

    Raises:
        ArgumentError: If the weights have fewer zeros than the record.
    """
    for path in (folder / MASK_FILE for folder in folders):
        if path.is_file():
            stored, masks = read_pruner(path)
            if stored["sha256"] == record["sha256"]:
                return masks
    masks = zeros_as_masks(space, record["masks"])
    if fingerprint(masks) != record["sha256"]:
        warn_of(
            f"No {MASK_FILE} of this checkpoint was found, so every zero in its weights "
            "counts as pruned, which may differ from the original masks."
        )
        _check_not_dense(record, masks)
    return masks


def follow_best(pruner: GradualPruner, folder: Path) -> None:
    """Use the masks of the best checkpoint, whose weights were just loaded.

    Raises:
        AlignmentError: If the weights are not those of its masks.
    """
    path = folder / MASK_FILE
    if not path.is_file():
        return  # that the weights fit the masks is checked in any case
    record, masks = read_pruner(path)
    if record["sha256"] == fingerprint(pruner.state_dict()["masks"]):
        return
    reached = pruner.sparsity
    check_zeros(pruner.space, masks)
    check_frozen(pruner.space, masks, record)
    pruner.load_state_dict(state_from(record, masks))
    warn_of(
        f"The best checkpoint, {folder.name}, has a sparsity of {record['sparsity']:.4f}; "
        f"training had reached {reached:.4f}. Its own masks hold now."
    )


def zeros_at_start(space: ParameterSpace) -> Masks:
    """Masks of a previously pruned model, in which exact zeros count as pruned.

    A tensor of zeros only counts as new, such as a zero-initialised head, with
    a warning.
    """
    masks = {tensor.name: tensor.leaf.detach() != 0 for tensor in space}
    blank = [name for name, mask in masks.items() if not bool(mask.any())]
    if blank:
        warn_of(
            f"Every entry of `{blank[0]}` is zero ({len(blank)} such tensors), which counts as new "
            "and not as pruned: leave it out with `exclude` if it is to stay so."
        )
    return {n: mask for n, mask in masks.items() if n not in blank and not bool(mask.all())}


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """Find the newest complete checkpoint, to resume a run that was killed.

    The masks are the last file of a checkpoint and written atomically. The Trainer's own search
    for a checkpoint also finds one whose weights or optimizer are incomplete.

    Args:
        folder: ``output_dir`` of the training.

    Returns:
        The folder for ``Trainer.train(resume_from_checkpoint=...)``; ``None`` if there is none.
    """
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{MASK_FILE}")]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def warn_of(message: str) -> None:
    """Warn on behalf of a callback."""
    warn(message, TorchPruneBayesWarning, stacklevel=3)


def _check_not_dense(record: Mapping[str, Any], masks: Masks) -> None:
    entries = sum(mask.numel() for mask in masks.values())
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    if masks and pruned < round(record["sparsity"] * entries):
        raise ArgumentError(
            f"Expected weights with a sparsity of {record['sparsity']:.4f}, in the record of the "
            f"checkpoint, got {pruned} zeros among {entries}."
        )
