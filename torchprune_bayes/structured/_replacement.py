"""Replacing tensors and numbers in a model, and restoring the old ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_bayes.errors import ParameterError
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.structured._layer_sizes import layer_sizes
from torchprune_bayes.wiring.tensors import all_tensors


class _ClassOf:
    """The class of a module as a table of one entry."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __setitem__(self, key: str, value: type[nn.Module]) -> None:
        self._module.__class__ = value


Write: TypeAlias = tuple["dict[str, Any] | _ClassOf", str, Any, Any]
"""A table of a module (parameters, buffers, attributes or class), a key, its new and old value."""


@dataclass(frozen=True)
class Change:
    """A replacement in a model that keeps the old objects, so that it can be undone.

    Attributes:
        parameters: The old and the new parameter by first qualified name.
        names: First qualified names of all replaced tensors, buffers included.
    """

    parameters: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
    names: frozenset[str]
    _writes: tuple[Write, ...]

    def undo(self) -> None:
        """Restore the old tensors and numbers."""
        for table, key, _, old in self._writes:
            table[key] = old

    def redo(self) -> None:
        """Install the new tensors and numbers."""
        for table, key, new, _ in self._writes:
            table[key] = new


@contextmanager
def as_it_was_on_error(
    models: Sequence[nn.Module], optimizer: Optimizer | None = None
) -> Iterator[None]:
    """Restore the same objects in models and an optimizer if the body fails, at any line.

    Args:
        models: Their parameters, buffers and attributes are replaced in the body, not written to;
            other objects are skipped.
        optimizer: Its lists of parameters and its state are replaced.

    Cost: a reference for each of these.
    """
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    tables: list[dict[Any, Any]] = [
        table for module in modules for table in (module._parameters, module._buffers, vars(module))
    ]
    lists: list[list[Any]] = []
    if optimizer is not None:
        tables.append(optimizer.state)
        lists += [group["params"] for group in optimizer.param_groups]
    held = [(table, dict(table)) for table in tables]
    classes = [(module, type(module)) for module in modules]
    listed = [(one, list(one)) for one in lists]
    try:
        yield
    except BaseException:
        for table, before in held:
            for key in [key for key in table if key not in before]:
                del table[key]
            table.update(before)
        for one, members in listed:
            one[:] = members
        for module, kind in classes:
            if type(module) is not kind:
                module.__class__ = kind
        raise


def replacement(
    model: nn.Module,
    fresh: Mapping[str, Tensor],
    cut: Callable[[str, Tensor], Tensor],
    attributes: Mapping[str, Mapping[str, float]],
) -> Change:
    """Replace tensors under all their names, and set the dependent numbers.

    Args:
        model: The model.
        fresh: New tensors by the first qualified name of the old ones.
        cut: Turns a gradient of the old shape into one of the new.
        attributes: Numbers by module and attribute.

    Returns:
        The change, which is done already.

    Raises:
        ParameterError: If a layer cannot hold its new tensors, or has no such number. Nothing has
            changed then.
    """
    names: dict[int, str] = {}
    for name, tensor, _ in all_tensors(model):
        names.setdefault(id(tensor), name)
    built: dict[str, Tensor] = {}
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    writes: list[Write] = []
    for path, module in model.named_modules():
        own = {**_present(module._parameters), **_present(module._buffers)}
        changed = {key: names[id(old)] for key, old in own.items() if names[id(old)] in fresh}
        for key, name in changed.items():
            if name not in built:
                built[name] = _successor(name, own[key], fresh[name], cut)
            old, new = own[key], built[name]
            if isinstance(old, nn.Parameter) and isinstance(new, nn.Parameter):
                pairs[name] = (old, new)
            table: dict[str, Any] = (
                module._parameters if key in module._parameters else module._buffers
            )
            writes.append((table, key, new, old))
        if changed:
            present = {k: built.get(names[id(t)], t) for k, t in own.items()}
            writes += _numbers(path, module, layer_sizes(path, module, present))
            writes += _flat_weights(module, present)
            kind = kind_of(module).class_for(module, present)
            if kind is not type(module):
                writes.append((_ClassOf(module), "__class__", kind, type(module)))
    for path, numbers in attributes.items():
        writes += _numbers(path, model.get_submodule(path), numbers)
    change = Change(pairs, frozenset(built), tuple(writes))
    change.redo()
    return change


def _present(table: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in table.items() if tensor is not None}


def _numbers(path: str, module: nn.Module, values: Mapping[str, Any]) -> list[Write]:
    missing = [key for key in values if key not in vars(module)]
    if missing:
        raise ParameterError(
            f"Expected `{path or 'the model'}` to have a plain attribute `{missing[0]}`, got none."
        )
    return [(vars(module), key, value, vars(module)[key]) for key, value in values.items()]


def _flat_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Write]:
    """Recurrent layers keep a list of their parameters beside the parameters themselves."""
    if not isinstance(module, nn.RNNBase):
        return []
    fresh = [tensors.get(key) for key in module._flat_weights_names]
    return [(vars(module), "_flat_weights", fresh, module._flat_weights)]


def _successor(
    name: str, old: Tensor, value: Tensor, cut: Callable[[str, Tensor], Tensor]
) -> Tensor:
    value = _formatted(value, old)
    if not isinstance(old, nn.Parameter):
        return value
    if type(old) is not nn.Parameter:
        raise ParameterError(
            f"Expected `{name}` to be a plain parameter, got {type(old).__name__}."
        )
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    if old.grad is not None:
        new.grad = _formatted(cut(name, old.grad), old)
    return new


def _formatted(value: Tensor, like: Tensor) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
    if last is not None and not like.is_contiguous() and like.is_contiguous(memory_format=last):
        return value.contiguous(memory_format=last)
    return value.contiguous()
