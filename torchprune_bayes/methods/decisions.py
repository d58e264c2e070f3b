"""What every decision is checked for before it is applied, and how new values are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchprune_bayes._checks import check_finite
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision


def check_prunable(space: ParameterSpace) -> None:
    """Refuse tensors that cannot be pruned as they are now.

    Raises:
        AlignmentError: If a layer was replaced since the parameters were listed.
        ArgumentError: If a tensor has NaN or infinite entries.
        ParameterError: If forward pre-hooks cannot work on a tensor, or its mask is not binary.
    """
    space.check_in_model()
    space.check_hookable()
    for tensor in space:
        check_finite(tensor.name, tensor.leaf)
        if not all(((mask == 0) | (mask == 1)).all() for mask in tensor.known_masks):
            raise ParameterError(
                f"Expected a mask of zeros and ones on `{tensor.name}`, got other values."
            )


def check_decision(space: ParameterSpace, decision: Decision) -> None:
    """Refuse a decision that does not fit the tensors, revives entries or ruins weights.

    Raises:
        ArgumentError: If a mask is missing, misshapen, not boolean or keeps an entry that is
            pruned already, or a new value is missing, misshapen or not finite.
    """
    for tensor in space:
        mask = decision.masks.get(tensor.name)
        _check_like(tensor.leaf, f"masks['{tensor.name}']", mask, torch.bool)
        assert mask is not None
        revived = int((mask.to(tensor.leaf.device) & ~tensor.mask).sum())
        if revived:
            raise ArgumentError(
                f"Expected pruned entries of `{tensor.name}` to stay so, got {revived} revived."
            )
        if decision.updates is not None:
            update = decision.updates.get(tensor.name)
            _check_like(tensor.leaf, f"updates['{tensor.name}']", update)
            assert update is not None
            check_finite(f"updates['{tensor.name}']", update)


def write_updates(space: ParameterSpace, updates: Mapping[str, Tensor] | None) -> None:
    """Write new values into the same ``Parameter`` objects, so that optimizers remain valid."""
    if updates is None:
        return
    with torch.no_grad():
        for tensor in space:
            tensor.leaf.copy_(updates[tensor.name])


def _check_like(
    leaf: Tensor, what: str, tensor: Tensor | None, dtype: torch.dtype | None = None
) -> None:
    if tensor is None or tensor.shape != leaf.shape or dtype not in (None, tensor.dtype):
        kind = "a tensor" if dtype is None else f"a {dtype} tensor"
        got = "none" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ArgumentError(
            f"Expected {kind} of shape {tuple(leaf.shape)} for `{what}`, got {got}."
        )
