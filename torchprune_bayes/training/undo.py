"""Restoring state when something fails half-way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from torchprune_bayes.training._optimizers import local_part, moments_of


@contextmanager
def tensors_kept_on_error(places: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Restore the values of tensors if the body fails.

    Args:
        places: Tensors, each with a boolean mask of the entries that the body may change, or
            ``None`` for all. Costs a copy of these entries.
    """
    saved = [
        (tensor, where, tensor.detach().clone() if where is None else tensor.detach()[where])
        for tensor, where in places
    ]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, where, values in saved:
                if where is None:
                    tensor.copy_(values)
                else:
                    tensor[where] = values
        raise


@contextmanager
def zeroing_undone(
    zeros: Mapping[Tensor, Tensor], optimizer: Optimizer | None, moved: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Restore weights, their gradients and the optimizer if the body, which zeroes them, fails.

    Args:
        zeros: Entries that become zero, by parameter; of the local part of a sharded one.
        optimizer: Holds the moments.
        moved: Parameters of which the body may change other entries too.
    """
    places: list[tuple[Tensor, Tensor | None]] = [(parameter, None) for parameter in moved]
    for parameter, where in zeros.items():
        gradients = [parameter.grad] if parameter.grad is not None else []
        moments = [] if optimizer is None else moments_of(optimizer, parameter)
        written = [local_part(tensor) for tensor in (parameter, *gradients, *moments)]
        dense = [tensor for tensor in written if not tensor.is_sparse]
        places += [(t, where.to(t.device) & (t.detach() != 0)) for t in dense]
    with tensors_kept_on_error(places), _rest_kept_on_error(optimizer):
        yield


@contextmanager
def state_kept_on_error(optimizer: Optimizer | None) -> Iterator[None]:
    """Restore an optimizer's state if the body, which may load another one, fails."""
    before = None if optimizer is None else (optimizer.state, optimizer.param_groups)
    try:
        yield
    except BaseException:
        if optimizer is not None and before is not None:
            optimizer.state, optimizer.param_groups = before
        raise


@contextmanager
def _rest_kept_on_error(optimizer: Optimizer | None) -> Iterator[None]:
    # The settings of the groups, and all that L-BFGS stores, as it is reset as a whole.
    lbfgs_state: dict[Any, Any] = {}
    if isinstance(optimizer, LBFGS):
        lbfgs_state = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    groups = [] if optimizer is None else [(g, dict(g)) for g in optimizer.param_groups]
    try:
        yield
    except BaseException:
        if optimizer is not None:
            optimizer.state.update(lbfgs_state)
        for group, settings in groups:
            group.update(settings)
        raise
