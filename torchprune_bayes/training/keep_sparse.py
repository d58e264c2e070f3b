"""Keeping zeros zero while an optimizer updates the other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle, unserializable_hook

from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.params import leaf, mask_of, prunable_parameters, unwrap
from torchprune_bayes.training._optimizers import (
    bare_optimizer,
    check_in_optimizer,
    ids_in,
    lbfgs_directions,
    local_part,
    moments_of,
)
from torchprune_bayes.training.undo import zeroing_undone

_SUFFIX = "_orig"


class HeldZeros:
    """Hooks that keep zeros at zero, registered all or none; returned by :func:`keep_sparse`.

    Args:
        hooks: Functions that each register a hook.
    """

    def __init__(self, hooks: Iterable[Callable[[], RemovableHandle]] = ()) -> None:
        self._handles: list[RemovableHandle] = []
        try:
            for register in hooks:
                self._handles.append(register())
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the hooks, so that zeros may change again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def keep_sparse(
    optimizer: Optimizer,
    masks: Mapping[Any, Tensor] | nn.Module,
    *,
    model: nn.Module | None = None,
    state: bool = True,
) -> HeldZeros:
    """Keep pruned entries at exactly zero, now and after every ``optimizer.step()``.

    Momentum, moment estimates and weight decay move an entry even where its gradient is zero, and
    plain weights have gradients at their zeros too. This works through the optimizer's own step
    hooks and hooks of the parameters, on sharded parameters (FSDP2) through their local part.

    *Gradients* of pruned entries are zeroed as soon as they are computed, so that clipping, line
    searches, and optimizers that look at whole tensors see the remaining entries only. L-BFGS
    forgets what it stored of directions that no longer exist.

    *State*: of an optimizer's state the moments are kept at zero, recognised by their names
    in ``torch.optim``. Anything else, such as preconditioners or moments packed in 8 bits, is not
    changed; the weights are zero after every step in any case.

    Args:
        optimizer: Any ``torch.optim`` optimizer; accelerate's wrapper is looked through.
        masks: Masks shaped like their parameters, zero where these are pruned: by parameter; or by
            qualified name, as from ``masks_of``, ``import_masks`` and decisions, with
            ``model``; or a pruned model. In a model, tensors pruned through torch's pruning API
            have their masks, and of the plain weights in
            :func:`~torchprune_bayes.prunable_parameters` every exact zero counts as pruned. So
            pass masks where weights are zero for other reasons, as in newly added heads.
        model: The model that the names refer to.
        state: Whether moments are kept at zero in the same places.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        AlignmentError: If a parameter is not in the model or the optimizer, or a mask has another
            shape.
        ArgumentError: If a model is given in which nothing is pruned.
        ArgumentTypeError: If the optimizer takes no hooks, or masks are by name without a model.

    Cost: one byte per masked weight; one elementwise pass per step over the weights, one over
    their gradients and, with ``state``, one over the moments.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
        >>> mask = torch.tensor([[True, False, True, False]])
        >>> handle = keep_sparse(optimizer, {"weight": mask}, model=layer)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> layer.weight.grad
        tensor([[1., 0., 1., 0.]])
        >>> optimizer.step()
        >>> torch.equal(layer.weight != 0, mask)
        True
        >>> handle.remove()
    """
    optimizer = bare_optimizer(optimizer)
    by_parameter = _by_parameter(masks, model, optimizer)
    check_in_optimizer(optimizer, by_parameter)
    for parameter, mask in by_parameter.items():
        if mask.shape != parameter.shape:
            raise AlignmentError(
                f"Expected a mask of shape {tuple(parameter.shape)} like its parameter, "
                f"got {tuple(mask.shape)}."
            )
    pruned = {parameter: _local_zeros(parameter, mask) for parameter, mask in by_parameter.items()}

    def hold_gradients(optimizer: Optimizer, *_: Any) -> None:
        for parameter, zeros in pruned.items():
            _zero_gradient(parameter, zeros)

    def hold_zeros(optimizer: Optimizer, *_: Any) -> None:
        for parameter, zeros in pruned.items():
            for tensor in (parameter, *(moments_of(optimizer, parameter) if state else ())):
                set_zero(tensor, zeros)

    with zeroing_undone(pruned, optimizer):
        hold_gradients(optimizer)
        hold_zeros(optimizer)
        _forget_directions(optimizer, pruned)
        return HeldZeros(
            [
                lambda: optimizer.register_step_pre_hook(hold_gradients),
                lambda: optimizer.register_step_post_hook(hold_zeros),
                *_gradient_hooks(pruned),
            ]
        )


def hold_gradients_of(pruned: Mapping[Tensor, Tensor]) -> HeldZeros:
    """Zero the gradients of parameters where these masks are true, whenever they are computed.

    Frozen parameters are skipped.
    """
    return HeldZeros(_gradient_hooks(pruned))


def _gradient_hooks(pruned: Mapping[Tensor, Tensor]) -> list[Callable[[], RemovableHandle]]:
    trained = {p: zeros for p, zeros in pruned.items() if p.requires_grad}
    return [partial(_hold_gradient, parameter, zeros) for parameter, zeros in trained.items()]


def _hold_gradient(parameter: Tensor, zeros: Tensor) -> RemovableHandle:
    if hasattr(parameter, "placements"):  # gradients of sharded ones bypass autograd's hooks

        def after(parameter: Tensor) -> None:
            _zero_gradient(parameter, zeros)

        return parameter.register_post_accumulate_grad_hook(after)

    @unserializable_hook
    def masked(gradient: Tensor) -> Tensor:
        if gradient.is_sparse:
            return gradient
        return gradient.masked_fill(zeros.to(gradient.device), 0)

    return parameter.register_hook(masked)


@torch.no_grad()
def set_zero(tensor: Tensor, zeros: Tensor) -> None:
    """Set entries of a tensor, or of the local part of a sharded one, to zero in place.

    Args:
        tensor: Any tensor.
        zeros: Boolean, shaped like it or its local part, ``True`` where it becomes zero.
    """
    local = local_part(tensor)
    # Not a product with the mask: that would keep NaN and produce negative zeros.
    local.masked_fill_(zeros.to(local.device), 0)


def _zero_gradient(parameter: Tensor, zeros: Tensor) -> None:
    gradient = parameter.grad
    if gradient is not None and not gradient.is_sparse:
        set_zero(gradient, zeros)


def _by_parameter(
    masks: Mapping[Any, Tensor] | nn.Module,
    model: nn.Module | None,
    optimizer: Optimizer,
) -> dict[Tensor, Tensor]:
    if isinstance(masks, nn.Module):
        return _masks_in(masks, optimizer)
    by_parameter: dict[Tensor, Tensor] = {}
    for key, mask in masks.items():
        if isinstance(key, Tensor):
            by_parameter[key] = mask
        elif model is None:
            raise ArgumentTypeError(
                f"Expected masks by parameter, got one by the name {key!r}: "
                "pass the model that the names refer to as `model=`."
            )
        else:
            by_parameter[_tensor_named(model, key)] = mask
    return by_parameter


def _tensor_named(model: nn.Module, name: str) -> Tensor:
    prefix, _, key = name.rpartition(".")
    module = dict(unwrap(model).named_modules()).get(prefix)
    tensor = None if module is None else leaf(module, key)
    if tensor is None:
        raise AlignmentError(f"Expected names of tensors of the model, got {name!r}.")
    return tensor


def _masks_in(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, Tensor]:
    own = ids_in(optimizer)
    plain = [tensor for pair in prunable_parameters(model) if (tensor := leaf(*pair)) is not None]
    kept = {tensor: tensor.detach() != 0 for tensor in plain}
    for module in model.modules():
        for key, tensor in module._parameters.items():
            mask = mask_of(module, key.removesuffix(_SUFFIX)) if key.endswith(_SUFFIX) else None
            if tensor is not None and mask is not None:
                kept[tensor] = mask
    sparse = {p: mask for p, mask in kept.items() if id(p) in own and not bool(mask.all())}
    if not sparse:
        raise ArgumentError("Expected a pruned model, got one without zeros in the optimizer.")
    return sparse


def _forget_directions(optimizer: Optimizer, pruned: Mapping[Tensor, Tensor]) -> None:
    """Reset L-BFGS if stored steps or gradients contain pruned entries."""
    remembered = lbfgs_directions(optimizer)
    if not remembered:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = [pruned.get(p, torch.zeros_like(p, dtype=torch.bool)).flatten() for p in parameters]
    zeros = torch.cat(parts)
    if any(bool(vector[zeros].any()) for vector in remembered):
        for state in optimizer.state.values():
            state.clear()


def _local_zeros(parameter: Tensor, mask: Tensor) -> Tensor:
    zeros = mask.detach().to(parameter.device) == 0
    if hasattr(parameter, "placements") and not hasattr(zeros, "placements"):
        # Only a sharded parameter needs this part of torch, which not every build has.
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        zeros = distribute_tensor(zeros, mesh, placements)
    return local_part(zeros)
