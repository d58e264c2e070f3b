"""PyTorch's pruning state on a module: reading, ordering and restoring it.

For a tensor ``weight`` these are the parameter ``weight_orig``, the buffer ``weight_mask``, the
plain attribute ``weight`` (their product) and one forward pre-hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod, PruningContainer

from torchprune_bayes.params import leaf, mask_of


def pruning_hooks(module: nn.Module) -> dict[str, BasePruningMethod]:
    """PyTorch's hooks on a module, by the name of the tensor they mask."""
    hooks = module._forward_pre_hooks.values()
    return {hook._tensor_name: hook for hook in hooks if isinstance(hook, BasePruningMethod)}


@contextmanager
def same_order(module: nn.Module) -> Iterator[None]:
    """Keep the order of a module's parameters while PyTorch renames some.

    PyTorch moves what it renames to the end, but optimizer states are matched by position.
    """
    places = {_plain(key): place for place, key in enumerate(module._parameters)}
    yield
    items = sorted(module._parameters.items(), key=lambda item: places[_plain(item[0])])
    _refill(module._parameters, dict(items))


@contextmanager
def all_or_nothing(pairs: Iterable[tuple[nn.Module, str]], *, values: bool) -> Iterator[None]:
    """Put everything PyTorch keeps for ``pairs`` back if the body fails.

    Args:
        pairs: ``(module, tensor name)`` pairs.
        values: Whether the body may write into the parameters; costs a copy of them.
    """
    undo = [_restorer(module, name, values=values) for module, name in pairs]
    try:
        yield
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise


def _restorer(module: nn.Module, name: str, *, values: bool) -> Callable[[], None]:
    written = [mask_of(module, name), leaf(module, name) if values else None]
    contents = [(held, held.detach().clone()) for held in written if held is not None]
    tables: list[dict[Any, Any]] = [
        module._parameters,
        module._buffers,
        module._forward_pre_hooks,
    ]
    copies = [dict(table) for table in tables]
    view = module.__dict__.get(name)
    # PyTorch adds a second method to its container before it tries the method.
    containers = [
        (hook, hook._pruning_methods)
        for hook in pruning_hooks(module).values()
        if isinstance(hook, PruningContainer)
    ]

    def restore() -> None:
        with torch.no_grad():
            for held, content in contents:
                held.copy_(content)
        for table, copy in zip(tables, copies, strict=True):
            _refill(table, copy)
        for container, methods in containers:
            container._pruning_methods = methods
        module.__dict__.pop(name, None)
        if view is not None:
            module.__dict__[name] = view

    return restore


def _plain(key: str) -> str:
    return key.removesuffix("_orig")


def _refill(target: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    target.clear()
    target.update(content)
