"""Applying decisions to models that PyTorch's pruning understands, and the way back.

In plain words: everything is planned and checked before anything is changed, and what is left
behind is exactly what ``torch.nn.utils.prune`` leaves: ``<name>_orig``, ``<name>_mask`` and a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from torchprune_bayes._checks import check_finite
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError, ParameterError
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.registry import find_method
from torchprune_bayes.params import ParameterSpace, PrunableTensor, leaf, mask_of, without_repeats
from torchprune_bayes.types import Decision, Masks, ParameterPairs


def prune_global(
    params: ParameterPairs | None,
    method: type[prune.BasePruningMethod] | str,
    **options: Any,
) -> Decision:
    """Prune tensors together, all or none: the atomic form of ``prune.global_unstructured``.

    Gives the masks that the host's call gives, and more: it takes any memory format and any
    iterable, counts tied tensors once, keeps no flat mask alive, prunes again in place, and leaves
    the model untouched if anything fails.

    Args:
        params: ``(module, tensor name)`` pairs; ``None`` takes the calibration's.
        method: A class, ours or the host's with ``PRUNING_TYPE = "unstructured"``, or the name of a
            registered method.
        options: Arguments of the method, ``amount`` and mostly ``calibration``.

    Returns:
        The decision that was applied.

    Raises:
        AlignmentError: If ``params`` are not the calibration's.
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If the method is no unstructured pruning method, or something is missing.
        ParameterError: If a tensor cannot be pruned.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> params = [(layer, "weight") for layer in model]
        >>> decision = prune_global(params, "magnitude", amount=0.5)
        >>> sum(int(mask.sum()) for mask in decision.masks.values())
        16
    """
    instance = _unstructured(method)(**options)
    space = _space_for(instance, params)
    space.check_hookable()
    for tensor in space:
        check_finite(tensor.name, tensor.leaf)
    if isinstance(instance, PruningMethod):
        decision = instance.decide(space)
        instance.release()
    else:
        decision = _decide_by_host(instance, space)
    apply_decision(space, decision)
    return decision


def apply_decision(space: ParameterSpace, decision: Decision) -> None:
    """Write updates and masks into the modules of ``space``; on failure everything is put back.

    Args:
        space: The tensors, as they were when the decision was made.
        decision: Masks and, if weights move, new values by qualified name.
    """
    undo: list[Callable[[], None]] = []
    try:
        for tensor in space:
            undo.append(_snapshot(tensor, keep_values=decision.updates is not None))
            if decision.updates is not None:
                with torch.no_grad():
                    tensor.leaf.copy_(decision.updates[tensor.name])
            _set_mask(tensor, decision.masks[tensor.name])
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise


def bake(model: nn.Module) -> nn.Module:
    """Make all pruning of a model permanent: plain weights with zeros, no masks, no hooks.

    Unlike ``prune.remove`` on every module it handles tied tensors once: ``tie`` partners keep
    sharing the same parameter. Zeros are not protected from an optimizer afterwards; see
    :func:`~torchprune_bayes.keep_sparse`.

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
        for name in _pruned_names(module):
            order = [name if key == f"{name}_orig" else key for key in module._parameters]
            prune.remove(module, name)
            _reorder(module, order)
    return model


def detach_views(model: nn.Module) -> nn.Module:
    """Detach the masked views of a pruned model, so that ``copy.deepcopy`` works again.

    After pruning and after every training forward pass ``module.weight`` is a non-leaf tensor, on
    which ``deepcopy`` fails, and with it EMA, SWA and FLOP counters. The next forward pass makes
    fresh views. Values do not change.

    Args:
        model: The model; changed in place.

    Returns:
        The model.
    """
    for module in model.modules():
        for name in _pruned_names(module):
            view = module.__dict__.get(name)
            if isinstance(view, Tensor):
                module.__dict__[name] = view.detach()
    return model


def masks_of(model: nn.Module) -> Masks:
    """Boolean masks of everything that is pruned in a model, by qualified name."""
    found: Masks = {}
    for prefix, module in model.named_modules():
        for name in _pruned_names(module):
            mask = mask_of(module, name)
            assert mask is not None
            found[f"{prefix}.{name}" if prefix else name] = mask.detach() != 0
    return found


def export_masks(model: nn.Module, path: str | Path) -> None:
    """Write the masks of a pruned model to a safetensors file, one byte per weight.

    Raises:
        ArgumentError: If nothing is pruned.
    """
    masks = masks_of(model)
    if not masks:
        raise ArgumentError("Expected a pruned model to export masks from, got none pruned.")
    save_file({name: mask.contiguous() for name, mask in masks.items()}, path)


def import_masks(model: nn.Module, path: str | Path) -> Masks:
    """Prune a model by the masks of a file that :func:`export_masks` wrote.

    Args:
        model: A model with tensors of the same names and shapes; changed in place.
        path: The file.

    Returns:
        The masks.

    Raises:
        AlignmentError: If a tensor is missing or has another shape; nothing is changed then.
    """
    masks = load_file(path)
    modules = dict(model.named_modules())
    pairs = []
    for full, mask in masks.items():
        prefix, _, name = full.rpartition(".")
        tensor = leaf(modules[prefix], name) if prefix in modules else None
        if tensor is None or tensor.shape != mask.shape:
            found = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
            raise AlignmentError(
                f"Expected a tensor `{full}` of shape {tuple(mask.shape)}, got {found}."
            )
        pairs.append((modules[prefix], name))
    space = ParameterSpace(model, pairs)
    placed = {
        tensor.name: masks[tensor.name].to(tensor.leaf.device) & tensor.mask for tensor in space
    }
    apply_decision(space, Decision(placed))
    return placed


def _unstructured(method: type[prune.BasePruningMethod] | str) -> type[prune.BasePruningMethod]:
    kind = find_method(method).method if isinstance(method, str) else method
    if not (isinstance(kind, type) and issubclass(kind, prune.BasePruningMethod)):
        raise ArgumentTypeError(f"Expected a BasePruningMethod class, got {kind!r}.")
    found = getattr(kind, "PRUNING_TYPE", None)
    if found != "unstructured":
        raise ArgumentTypeError(
            f"Expected an unstructured method, got {kind.__name__} of type {found!r}."
        )
    return kind


def _space_for(instance: prune.BasePruningMethod, params: ParameterPairs | None) -> ParameterSpace:
    calibrated = isinstance(instance, PruningMethod) and instance.needs_calibration
    if not calibrated:
        if params is None:
            raise ArgumentTypeError(
                f"Expected (module, tensor name) pairs for {type(instance).__name__}, got None."
            )
        return ParameterSpace.of_pairs(params)
    assert isinstance(instance, PruningMethod)
    space = instance.space
    if params is not None:
        wanted = {(id(module), name) for module, name in without_repeats(params)}
        known = {(id(module), name) for module, name in space.pairs()}
        if wanted != known:
            raise AlignmentError(
                f"Expected the {len(known)} parameters of the calibration, got a list of "
                f"{len(wanted)} with {len(wanted & known)} of them: pass the same list to both."
            )
    return space


def _decide_by_host(method: prune.BasePruningMethod, space: ParameterSpace) -> Decision:
    # The host's contract: a flat vector of the live entries and a mask of ones.
    values, masks = space.values(), space.masks()
    flat = torch.cat([values[name][mask] for name, mask in masks.items()])
    kept = method.compute_mask(flat, torch.ones_like(flat)) != 0
    pieces = kept.split([int(mask.sum()) for mask in masks.values()])
    new = {
        name: torch.zeros_like(mask).masked_scatter_(mask, piece)
        for (name, mask), piece in zip(masks.items(), pieces, strict=True)
    }
    return Decision(new)


def _set_mask(tensor: PrunableTensor, mask: Tensor) -> None:
    module, name = tensor.module, tensor.tensor_name
    current = mask_of(module, name)
    if current is None:
        order = [f"{name}_orig" if key == name else key for key in module._parameters]
        prune.custom_from_mask(module, name, mask.to(tensor.leaf.device))
        _reorder(module, order)
        hook = _hook_of(module, name)
        hook.mask = mask_of(module, name)  # type: ignore[attr-defined]  # one mask, not two
    else:
        with torch.no_grad():
            current.copy_(mask)
        setattr(module, name, _hook_of(module, name).apply_mask(module))


def _snapshot(tensor: PrunableTensor, *, keep_values: bool) -> Callable[[], None]:
    module, name, parameter = tensor.module, tensor.tensor_name, tensor.leaf
    values = parameter.detach().clone() if keep_values else None
    old_mask = mask_of(module, name)
    saved_mask = None if old_mask is None else old_mask.clone()
    parameters, buffers = module._parameters.copy(), module._buffers.copy()
    hooks, attributes = module._forward_pre_hooks.copy(), module.__dict__.get(name)

    def restore() -> None:
        with torch.no_grad():
            if values is not None:
                parameter.copy_(values)
            if old_mask is not None and saved_mask is not None:
                old_mask.copy_(saved_mask)
        _refill(module._parameters, parameters)
        _refill(module._buffers, buffers)
        _refill(module._forward_pre_hooks, hooks)
        if attributes is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = attributes

    return restore


def _refill(target: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    target.clear()
    target.update(content)


def _pruned_names(module: nn.Module) -> list[str]:
    hooks = module._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def _hook_of(module: nn.Module, name: str) -> prune.BasePruningMethod:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            return hook
    raise ParameterError(
        f"Expected the host's hook on `{name}` of {type(module).__name__}, got a mask without one."
    )


def _reorder(module: nn.Module, order: list[str]) -> None:
    # The host moves a pruned tensor to the end, and optimizer states are matched by position.
    _refill(module._parameters, {key: module._parameters[key] for key in order})
