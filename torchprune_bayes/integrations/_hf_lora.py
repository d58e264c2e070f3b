"""Merging low-rank adapters into a pruned model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods import bake
from torchprune_bayes.params import PrunableTensor, adapted_base, prunable_parameters
from torchprune_bayes.training.keep_sparse import set_zero

logger = logging.getLogger("torchprune_bayes")


def merge_adapters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Merge LoRA adapters into their base weights, and keep their pruned entries at zero.

    ``W + BA`` is dense whatever ``W`` is, so a plain merge loses the sparsity. This merges
    ``W + mask * BA``. The entries of ``BA`` that are removed were part of the model while it was
    trained, so its outputs change; the removed share is logged. A model that was pruned through
    torch's pruning API becomes plain, as by :func:`~torchprune_bayes.bake`.

    Args:
        model: A ``peft`` model, or any with its interface: ``merge_and_unload()``, and layers
            with a ``base_layer``.
        masks: Masks of the base weights by their qualified names in the merged model; default:
            every exact zero counts as pruned.

    Returns:
        The merged model, without adapters.

    Raises:
        ArgumentError: If the model has no adapters, a mask has another shape, or adapters are in
            the weights already and no masks are given. Nothing is changed then.

    Cost: a copy of the weights of the layers with adapters.
    """
    merge = getattr(model, "merge_and_unload", None)
    adapters = {base: m for m in model.modules() if (base := adapted_base(m)) is not None}
    if not adapters or merge is None:
        raise ArgumentError(f"Expected a model with LoRA adapters, got {type(model).__name__}.")
    places = _merged_places(model, adapters)
    for place in places:
        _check_place(place, masks, merged=getattr(adapters[place.module], "merged", False))
    bake(model)
    before = {place.name: place.leaf.detach().clone() for place in places}
    merged: nn.Module = merge()
    for place in places:
        dense = before[place.name]
        mask = None if masks is None else masks.get(place.name)
        pruned = dense == 0 if mask is None else mask.to(dense.device) == 0
        moved = (place.leaf.detach() - dense).square()
        cut = float(moved[pruned].sum() / moved.sum().clamp_min(torch.finfo(moved.dtype).tiny))
        logger.info("%s: %.1f %% of the adapter's squared norm was removed.", place.name, 100 * cut)
        set_zero(place.leaf, pruned)
    return merged


def _merged_places(
    model: nn.Module, adapters: Mapping[nn.Module, nn.Module]
) -> list[PrunableTensor]:
    """The prunable weights under adapters, by the names that they will have in the merged model."""
    names = {module: name for name, module in _inner(model).named_modules()}
    return [
        PrunableTensor(module, key, f"{names[adapters[module]]}.{key}")
        for module, key in prunable_parameters(model)
        if module in adapters
    ]


def _inner(model: Any) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model.base_model
    assert isinstance(base, nn.Module)
    return base


def _check_place(
    place: PrunableTensor, masks: Mapping[str, Tensor] | None, *, merged: bool
) -> None:
    mask = None if masks is None else masks.get(place.name)
    if mask is None and merged:
        raise ArgumentError(
            f"Expected a mask of `{place.name}`, whose adapter is in the weights already, so that "
            "zeros no longer show what was pruned, got none: pass masks, or unmerge first."
        )
    if mask is not None and mask.shape != place.leaf.shape:
        raise ArgumentError(
            f"Expected a mask of shape {tuple(place.leaf.shape)} for `{place.name}`, "
            f"got {tuple(mask.shape)}."
        )
