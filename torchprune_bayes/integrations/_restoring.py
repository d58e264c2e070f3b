"""Restoring models, optimizers and other parts of a training if loading fails."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torchprune_bayes.training.undo import tensors_kept_on_error


@contextmanager
def parts_kept_on_error(parts: Iterable[Any]) -> Iterator[None]:
    """Restore parts of a training, and random states, if the body, which loads into them, fails.

    Args:
        parts: Models and optimizers, which are restored tensor by tensor, and anything else with
            ``state_dict`` and ``load_state_dict``, which loads its old state. Costs a copy of
            all of it.
    """
    distinct = list({id(part): part for part in parts}.values())
    models = [part for part in distinct if isinstance(part, nn.Module)]
    optimizers = [part for part in distinct if isinstance(part, Optimizer)]
    others = [part for part in distinct if not isinstance(part, (nn.Module, Optimizer))]
    states = [copy.deepcopy(part.state_dict()) for part in others]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    with ExitStack() as stack:
        stack.enter_context(_random_states_kept_on_error())
        stack.enter_context(tensors_kept_on_error([(tensor, None) for tensor in tensors]))
        try:
            with ExitStack() as first:
                for model in models:
                    first.enter_context(tables_kept_on_error(model))
                for optimizer in optimizers:
                    first.enter_context(optimizer_kept_on_error(optimizer))
                yield
        except BaseException:
            for part, state in zip(others, states, strict=True):
                with suppress(Exception):  # one that fails must not prevent the others
                    part.load_state_dict(state)
            raise


@contextmanager
def tables_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Restore a model's parameters, buffers, hooks and plain attributes if the body fails.

    The same objects are put back, with whatever was written into them.
    """
    holders: list[dict[Any, Any]] = []
    for module in model.modules():
        tables = (module._parameters, module._buffers, module._forward_pre_hooks)
        holders += [vars(module), *tables]
    if hasattr(config := getattr(model, "config", None), "__dict__"):
        holders.append(vars(config))
    contents = [(holder, dict(holder)) for holder in holders]
    try:
        yield
    except BaseException:
        for holder, content in contents:
            holder.clear()
            holder.update(content)
        raise


@contextmanager
def optimizer_kept_on_error(optimizer: Optimizer) -> Iterator[None]:
    """Restore an optimizer's groups and state if the body fails; costs a copy of the state."""
    groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
    states = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    tensors = [v for state in states.values() for v in state.values() if torch.is_tensor(v)]
    originals = (optimizer.param_groups, optimizer.state)
    with tensors_kept_on_error([(tensor, None) for tensor in tensors if _is_plain(tensor)]):
        try:
            yield
        except BaseException:
            optimizer.param_groups, optimizer.state = originals
            for group, content, parameters in groups:
                group.clear()
                group.update(content, params=parameters)
            optimizer.state.clear()
            optimizer.state.update(states)
            raise


@contextmanager
def _random_states_kept_on_error() -> Iterator[None]:
    python, cpu = random.getstate(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    except BaseException:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        raise


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter)  # packed states are replaced, not written
