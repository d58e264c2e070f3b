"""Applying decisions to models that PyTorch's pruning understands, and the way back.

In plain words: everything is planned and checked before anything is changed, and what is left
behind is exactly what ``torch.nn.utils.prune`` leaves: ``<name>_orig``, ``<name>_mask`` and a hook.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError, ParameterError
from torchprune_bayes.methods.base import PruningMethod, space_of_pairs
from torchprune_bayes.methods.decisions import check_decision, check_prunable, write_updates
from torchprune_bayes.methods.module_state import all_or_nothing, pruning_hooks, same_order
from torchprune_bayes.methods.registry import find_method
from torchprune_bayes.params import (
    ParameterSpace,
    leaf,
    mask_of,
    prunable_parameters,
)
from torchprune_bayes.types import Decision, ParameterPairs


def prune_global(
    params: ParameterPairs | nn.Module | None,
    method: type[prune.BasePruningMethod] | str,
    **options: Any,
) -> Decision:
    """Prune tensors jointly, all or none: the atomic form of ``prune.global_unstructured``.

    Gives the masks that PyTorch's call gives, and more: it takes any memory format and any
    iterable, counts tied tensors once and masks them at every place in ``params``, keeps no flat
    mask alive, leaves the order of the parameters, prunes again in place, and leaves the model
    untouched if anything fails.

    Args:
        params: ``(module, tensor name)`` pairs; or a model, for its
            :func:`~torchprune_bayes.prunable_parameters`; ``None`` takes the calibration's.
        method: A class, ours or PyTorch's with ``PRUNING_TYPE = "unstructured"``, or the name of a
            registered method.
        options: Arguments of the method, ``amount`` and mostly ``calibration``.

    Returns:
        The decision that was applied. Names are those of the model that the calibration, or the
        list from :func:`~torchprune_bayes.prunable_parameters`, knows; pairs that no model is
        known for are named by their place, ``params[0].weight``.

    Raises:
        AlignmentError: If ``params`` are not the calibration's, or a layer was replaced since they
            were listed.
        ArgumentError: If an option has an impossible value, or weights are not finite.
        ArgumentTypeError: If the method is not an unstructured pruning method, or an argument is
            missing.
        ParameterError: If a tensor cannot be pruned.

    Cost: that of the method; beside PyTorch's masks, a byte per weight, and a copy of the weights
    where the method moves them.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> decision = prune_global(prunable_parameters(model), "magnitude", amount=0.5)
        >>> sorted(decision.masks), sum(int(mask.sum()) for mask in decision.masks.values())
        (['0.weight', '1.weight'], 16)
    """
    if isinstance(params, nn.Module):
        params = prunable_parameters(params)
    pairs = None if params is None else list(params)
    space, decision = decide_globally(pairs, method, **options)
    apply_decision(space, decision, pairs)
    return decision


def decide_globally(
    params: list[tuple[nn.Module, str]] | None,
    method: type[prune.BasePruningMethod] | str,
    **options: Any,
) -> tuple[ParameterSpace, Decision]:
    """Decide what :func:`prune_global` applies, and on which tensors; changes no model."""
    instance = unstructured_method(method)(**options)
    space = _space_for(instance, params)
    return space, decide_on(space, instance)


def decide_on(space: ParameterSpace, method: prune.BasePruningMethod) -> Decision:
    """Let a method, ours or PyTorch's, decide on the tensors of ``space``; changes no model.

    Raises:
        ArgumentError: If weights are not finite.
        ParameterError: If a tensor cannot be pruned.
    """
    check_prunable(space)
    if not isinstance(method, PruningMethod):
        return _decide_by_pytorch(method, space)
    decision = method.decide_beside(space)
    method.release()
    return decision


def apply_decision(
    space: ParameterSpace, decision: Decision, params: ParameterPairs | None = None
) -> None:
    """Write updates and masks into the modules of ``space``; on failure everything is put back.

    Args:
        space: The tensors, as they were when the decision was made.
        decision: Masks and, if weights move, new values by qualified name.
        params: Places of these tensors to mask, where tied ones have several; default the space's.

    Raises:
        AlignmentError: If ``params`` are not the tensors of the space.
        ArgumentError: If the decision does not fit the tensors or revives pruned entries.
    """
    check_decision(space, decision)
    pairs = space.pairs() if params is None else list(params)
    space.check_same_tensors(pairs)
    masks = {id(tensor.leaf): decision.masks[tensor.name] for tensor in space}
    # The space reads masks at its own places, so these are masked in any case.
    places = dict.fromkeys([*space.pairs(), *pairs])
    with all_or_nothing(places, values=decision.updates is not None):
        write_updates(space, decision.updates)
        for module, name in places:
            _set_mask(module, name, masks[id(leaf(module, name))])


def bake(model: nn.Module) -> nn.Module:
    """Make all pruning of a model permanent: plain weights with zeros, no masks, no hooks.

    As ``prune.remove`` on every module, but parameters keep their order, so that the state of an
    optimizer still fits. A tied tensor remains tied, and its zeros apply at all its places. Nothing
    keeps an optimizer from moving the zeros; see :func:`~torchprune_bayes.keep_sparse`.

    Args:
        model: The model; changed in place.

    Returns:
        The model.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = prune_global([(layer, "weight")], "magnitude", amount=0.5)
        >>> [name for name, _ in bake(layer).named_parameters()]
        ['weight', 'bias']
    """
    for module in model.modules():
        with same_order(module):
            for name in pruning_hooks(module):
                prune.remove(module, name)
    return model


def detach_views(model: nn.Module) -> nn.Module:
    """Detach the masked views of a pruned model, so that ``copy.deepcopy`` works again.

    After pruning and after every training forward pass ``module.weight`` is a non-leaf tensor, on
    which ``deepcopy`` fails, and with it EMA, SWA and FLOP counters. The next forward pass makes
    new views. Values do not change.

    Args:
        model: The model; changed in place.

    Returns:
        The model.

    Example:
        >>> from copy import deepcopy
        >>> layer = nn.Linear(2, 2)
        >>> _ = prune_global([(layer, "weight")], "magnitude", amount=0.5)
        >>> torch.equal(deepcopy(detach_views(layer)).weight, layer.weight)
        True
    """
    for module in model.modules():
        for name in pruning_hooks(module):
            view = module.__dict__.get(name)
            if isinstance(view, Tensor):
                module.__dict__[name] = view.detach()
    return model


def unstructured_method(
    method: type[prune.BasePruningMethod] | str,
) -> type[prune.BasePruningMethod]:
    """Look a class up by name if needed, and refuse anything but an unstructured pruning method."""
    kind = find_method(method).method if isinstance(method, str) else method
    if not (isinstance(kind, type) and issubclass(kind, prune.BasePruningMethod)):
        raise ArgumentTypeError(f"Expected a BasePruningMethod class, got {kind!r}.")
    pruning_type = getattr(kind, "PRUNING_TYPE", None)
    if pruning_type != "unstructured":
        raise ArgumentTypeError(
            f"Expected an unstructured method, got {kind.__name__} of type {pruning_type!r}."
        )
    return kind


def _space_for(
    instance: prune.BasePruningMethod, pairs: list[tuple[nn.Module, str]] | None
) -> ParameterSpace:
    if isinstance(instance, PruningMethod):
        return instance.space_for(pairs)
    return space_of_pairs(pairs, type(instance).__name__)


def _decide_by_pytorch(method: prune.BasePruningMethod, space: ParameterSpace) -> Decision:
    # PyTorch's contract: a flat vector of the remaining entries and a mask of ones.
    remaining = RemainingVector(space.masks())
    flat = remaining.gather(space.values())
    mask: Any = method.compute_mask(flat, torch.ones_like(flat))
    if not ((mask == 0) | (mask == 1)).all():
        raise ArgumentError(
            f"Expected a mask of zeros and ones from {type(method).__name__}, got other values."
        )
    return Decision(remaining.scatter(mask == 1))


def _set_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    current = mask_of(module, name)
    if current is None:
        parameter = module._parameters[name]
        assert parameter is not None
        with same_order(module):
            prune.custom_from_mask(module, name, mask.to(parameter.device))
        # One mask, not two.
        pruning_hooks(module)[name].mask = mask_of(module, name)  # type: ignore[attr-defined]
        return
    hook = pruning_hooks(module).get(name)
    if hook is None:
        raise ParameterError(
            f"Expected PyTorch's hook on `{name}` of {type(module).__name__}, "
            "got a mask without one."
        )
    with torch.no_grad():
        current.copy_(mask)
    setattr(module, name, hook.apply_mask(module))
