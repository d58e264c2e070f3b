"""Everything that pruning could change by accident, as values that can be compared."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod, PruningContainer


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Hashable]:
    """Identities, values and order of all a model holds, optimizer states and random states."""
    found: dict[str, Hashable] = {}
    for prefix, module in model.named_modules():
        found[f"{prefix}: parameter order"] = tuple(module._parameters)
        found[f"{prefix}: buffer order"] = tuple(module._buffers)
        found[f"{prefix}: mode"] = module.training
        found[f"{prefix}: hooks"] = tuple(
            _hook(*item) for item in module._forward_pre_hooks.items()
        )
        for name, tensor in {**module._parameters, **module._buffers}.items():
            found[f"{prefix}.{name}"] = _tensor(tensor)
            found[f"{prefix}.{name}.grad"] = _tensor(None if tensor is None else tensor.grad)
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                found[f"{prefix}.{name} (view)"] = _tensor(value)
    for number, optimizer in enumerate(optimizers):
        found[f"optimizer {number}"] = _plain(optimizer.state_dict())
    return found | _random_states()


@contextmanager
def unchanged(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Assert that the body leaves everything in :func:`snapshot` as it was."""
    before = snapshot(model, *optimizers)
    yield
    after = snapshot(model, *optimizers)
    assert [key for key in before | after if before.get(key) != after.get(key)] == []


def _tensor(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (id(tensor), tensor.requires_grad, *_content(tensor))


def _content(tensor: Tensor) -> tuple[Hashable, ...]:
    values = tensor.detach().reshape(-1).view(torch.uint8)
    return (tensor.dtype, str(tensor.device), tensor.stride(), values.numpy().tobytes())


def _hook(key: int, hook: Any) -> Hashable:
    contents: Hashable = None
    if isinstance(hook, PruningContainer):
        contents = tuple(id(method) for method in hook)
    elif isinstance(hook, BasePruningMethod):
        contents = _plain(vars(hook))
    return (key, id(hook), contents)


def _plain(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return _content(value) if value.numel() else ()
    if isinstance(value, Mapping):
        return tuple((key, _plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _random_states() -> dict[str, Hashable]:
    numpy_state = np.random.get_state(legacy=True)
    return {
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "python random state": random.getstate(),
        "numpy random state": tuple(
            item.tobytes() if isinstance(item, np.ndarray) else item for item in numpy_state
        ),
    }
