"""Which modules and operations a model runs, to see whether two runs go the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def computes(operation: Any) -> bool:
    """Whether an operation computes; views and new tensors come from hooks and kernels, too."""
    return not operation.is_view and operation is not torch.ops.aten.empty.memory_format


@contextmanager
def noted(model: nn.Module) -> Iterator[list[str]]:
    """Note the names of modules that are called and of operations that compute, in their order."""
    names: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_pre_hook(
                lambda _, __, name=name: names.append(name), prepend=True
            )
            stack.callback(hook.remove)
        stack.enter_context(_Operations(names))
        yield names


class _Operations(TorchDispatchMode):
    """Appends the names of the operations that compute while it is entered."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note its name."""
        if computes(operation):
            self._names.append(str(operation))
        return operation(*args, **(kwargs or {}))
