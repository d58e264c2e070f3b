"""Keeping zeros zero while an optimizer works on the weights around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.params import leaf, mask_of, prunable_parameters

_SUFFIX = "_orig"


def keep_sparse(
    optimizer: Optimizer,
    masks: Mapping[Tensor, Tensor] | nn.Module,
    *,
    state: bool = True,
) -> RemovableHandle:
    """Hold pruned entries at exactly zero, now and after every ``optimizer.step()``.

    Momentum, moment estimates and weight decay move an entry even where its gradient is zero, and
    plain weights have gradients at their zeros too. This works through the optimizer's own
    ``register_step_post_hook``, on sharded parameters (FSDP2) through their local part.

    Args:
        optimizer: Any ``torch.optim`` optimizer; for a wrapped one pass what it wraps.
        masks: Masks by parameter, shaped like it, zero where it is pruned; or a pruned model. In a
            model, tensors pruned by the host have their masks, and of the plain weights in
            :func:`~torchprune_bayes.prunable_parameters` every exact zero counts as pruned. So
            give masks where weights are zero for other reasons, as newly added heads are.
        state: Whether tensors of the optimizer's state that are shaped like the parameter
            (momentum, Adam's moments) are held at zero in the same places.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        AlignmentError: If a parameter is not in the optimizer or a mask has another shape.
        ArgumentError: If a model is given in which nothing is pruned.

    Cost: one byte per masked weight; one elementwise pass per step over the weights and, with
    ``state``, over the state.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
        >>> mask = torch.tensor([[True, False, True, False]])
        >>> handle = keep_sparse(optimizer, {layer.weight: mask})
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> torch.equal(layer.weight != 0, mask)
        True
        >>> handle.remove()
    """
    if isinstance(masks, nn.Module):
        masks = _masks_in(masks, optimizer)
    check_in_optimizer(optimizer, masks)
    for parameter, mask in masks.items():
        if mask.shape != parameter.shape:
            raise AlignmentError(
                f"Expected a mask of shape {tuple(parameter.shape)} like its parameter, "
                f"got {tuple(mask.shape)}."
            )
    pruned = {parameter: _local_zeros(parameter, mask) for parameter, mask in masks.items()}

    def hold_zeros(optimizer: Optimizer, *_: Any) -> None:
        for parameter, zeros in pruned.items():
            moments = optimizer.state.get(parameter, {}).values() if state else ()
            for tensor in (parameter, *moments):
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                    set_zero(tensor, zeros)

    hold_zeros(optimizer)
    return optimizer.register_step_post_hook(hold_zeros)


@torch.no_grad()
def set_zero(tensor: Tensor, zeros: Tensor) -> None:
    """Set entries of a tensor, or of the local part of a sharded one, to zero in place.

    Args:
        tensor: Any tensor.
        zeros: Boolean, shaped like it or its local part, ``True`` where it becomes zero.
    """
    local = _local(tensor)
    # Not a product with the mask: that keeps NaN and leaves negative zeros.
    local.masked_fill_(zeros.to(local.device), 0)


def check_in_optimizer(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Refuse parameters that the optimizer does not have."""
    known = _ids_in(optimizer)
    missing = [parameter for parameter in parameters if id(parameter) not in known]
    if missing:
        raise AlignmentError(
            "Expected parameters of the optimizer, got "
            f"{len(missing)} others, the first of shape {tuple(missing[0].shape)}."
        )


def _ids_in(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _masks_in(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, Tensor]:
    known = _ids_in(optimizer)
    plain = [tensor for pair in prunable_parameters(model) if (tensor := leaf(*pair)) is not None]
    found = {tensor: tensor.detach() != 0 for tensor in plain}
    for module in model.modules():
        for key, tensor in module._parameters.items():
            mask = mask_of(module, key.removesuffix(_SUFFIX)) if key.endswith(_SUFFIX) else None
            if tensor is not None and mask is not None:
                found[tensor] = mask
    sparse = {p: mask for p, mask in found.items() if id(p) in known and not bool(mask.all())}
    if not sparse:
        raise ArgumentError("Expected a pruned model, got one without zeros in the optimizer.")
    return sparse


def _local_zeros(parameter: Tensor, mask: Tensor) -> Tensor:
    zeros = mask.detach().to(parameter.device) == 0
    if hasattr(parameter, "placements") and not hasattr(zeros, "placements"):
        # Only a sharded parameter needs this part of torch, which not every build has.
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        zeros = distribute_tensor(zeros, mesh, placements)
    return _local(zeros)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
