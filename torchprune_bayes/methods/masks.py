"""The masks of a pruned model, also to and from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from torchprune_bayes._files import read_tensors, save_tensors
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.methods.global_pruning import apply_decision
from torchprune_bayes.methods.module_state import pruning_hooks
from torchprune_bayes.params import ParameterSpace, leaf, mask_of, unwrap, without_repeats
from torchprune_bayes.types import Decision, Masks


def masks_of(model: nn.Module) -> Masks:
    """Boolean masks of everything that is pruned in a model, by qualified name.

    Wrappers such as ``DistributedDataParallel`` are looked through.

    Example:
        >>> from torchprune_bayes import prune_global
        >>> model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
        >>> _ = prune_global([(model[1], "weight")], "magnitude", amount=1.0)
        >>> masks_of(model)
        {'1.weight': tensor([[False],
                [False]])}
    """
    masks: Masks = {}
    for prefix, module in unwrap(model).named_modules():
        for name in pruning_hooks(module):
            mask = mask_of(module, name)
            assert mask is not None
            masks[f"{prefix}.{name}" if prefix else name] = mask.detach() != 0
    return masks


def export_masks(model: nn.Module, path: str | Path) -> None:
    """Write the masks of a pruned model to a safetensors file, one byte per weight.

    Raises:
        ArgumentError: If nothing is pruned, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> from torchprune_bayes import prune_global
        >>> layer = nn.Linear(2, 2)
        >>> _ = prune_global([(layer, "weight")], "magnitude", amount=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_masks(layer, f"{folder}/masks.safetensors")
        ...     masks = import_masks(nn.Linear(2, 2), f"{folder}/masks.safetensors")
        >>> torch.equal(masks["weight"], masks_of(layer)["weight"])
        True
    """
    masks = masks_of(model)
    if not masks:
        raise ArgumentError(
            "Expected a pruned model to export masks from, got none pruned: call prune_global "
            "first."
        )
    save_tensors(path, masks)


def import_masks(model: nn.Module, path: str | Path) -> Masks:
    """Prune a model by the masks of a file that :func:`export_masks` wrote.

    Args:
        model: A model with tensors of the same names and shapes; changed in place. Entries pruned
            in it already remain pruned.
        path: The file.

    Returns:
        The masks that hold now, by qualified name; a tied tensor once.

    Raises:
        AlignmentError: If a tensor is missing or has another shape; nothing is changed then.
        ArgumentError: If the file is missing, damaged, or of another kind.
        ArgumentTypeError: If the file holds other things than boolean masks.
        ParameterError: If a tensor cannot be pruned.
    """
    masks = read_tensors(path, "masks").tensors
    modules = dict(unwrap(model).named_modules())
    pairs = [_place_of(modules, full, mask) for full, mask in masks.items()]
    space = ParameterSpace(model, without_repeats(pairs))
    placed = {
        tensor.name: masks[tensor.name].to(tensor.leaf.device) & tensor.mask for tensor in space
    }
    apply_decision(space, Decision(placed), pairs)
    return placed


def _place_of(modules: Mapping[str, nn.Module], full: str, mask: Tensor) -> tuple[nn.Module, str]:
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(f"Expected a boolean mask of `{full}`, got {mask.dtype}.")
    if bool((mask.view(torch.uint8) > 1).any()):  # a truth value is a byte in the file
        raise ArgumentError(f"Expected zeros and ones in the mask of `{full}`, got other bytes.")
    prefix, _, name = full.rpartition(".")
    tensor = leaf(modules[prefix], name) if prefix in modules else None
    if tensor is None or tensor.shape != mask.shape:
        got = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
        raise AlignmentError(f"Expected a tensor `{full}` of shape {tuple(mask.shape)}, got {got}.")
    return modules[prefix], name
