"""The tensors of a model under all their names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield name, tensor and whether it belongs to the state, tied ones under every name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield dot + name, buffer, name not in module._non_persistent_buffers_set
