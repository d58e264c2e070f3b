"""Merging low-rank adapters into a pruned model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.training.keep_sparse import set_zero

logger = logging.getLogger("torchprune_bayes")


def merge_adapters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Merge LoRA adapters into their base weights, and keep what is pruned there at zero.

    ``W + BA`` is dense whatever ``W`` is, so a plain merge gives up the sparsity. This merges
    ``W + mask * BA``. The entries of ``BA`` that are cut off were part of the model while it was
    trained, so its outputs change; the share that is cut is logged.

    Args:
        model: A model of ``peft``, or any with its interface: ``merge_and_unload()``, and layers
            with a ``base_layer`` and ``get_delta_weight(adapter)``.
        masks: Masks of the base weights by their qualified names in the merged model; default:
            every exact zero counts as pruned.

    Returns:
        The merged model, without adapters.

    Raises:
        ArgumentError: If the model has no adapters, or a mask has another shape.

    Cost: a byte per weight of the layers with adapters.
    """
    before = {layer: layer.get_parameter("weight").detach().clone() for layer in _adapted(model)}
    merge = getattr(model, "merge_and_unload", None)
    if not before or merge is None:
        raise ArgumentError(f"Expected a model with LoRA adapters, got {type(model).__name__}.")
    merged: nn.Module = merge()
    names = {module: name for name, module in merged.named_modules()}
    for layer, dense in before.items():
        name = f"{names.get(layer, '')}.weight"
        weight = layer.get_parameter("weight")
        pruned = _from_masks(name, weight, masks, dense == 0)
        moved = (weight.detach() - dense).square()
        cut = float(moved[pruned].sum() / moved.sum().clamp_min(torch.finfo(moved.dtype).tiny))
        logger.info("%s: %.1f %% of the adapter's squared norm was cut.", name, 100 * cut)
        set_zero(weight, pruned)
    return merged


def _from_masks(
    name: str, weight: Tensor, masks: Mapping[str, Tensor] | None, zeros: Tensor
) -> Tensor:
    if masks is None or name not in masks:
        return zeros
    if masks[name].shape != weight.shape:
        raise ArgumentError(
            f"Expected a mask of shape {tuple(weight.shape)} for `{name}`, "
            f"got {tuple(masks[name].shape)}."
        )
    return masks[name].to(weight.device) == 0


def _adapted(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module) and hasattr(module, "get_delta_weight"):
            yield base
