"""Per-sample gradients by one ``backward`` per sample through the model itself, float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def per_sample_loop(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None,
    params: Iterable[tuple[nn.Module, str]],
) -> Tensor:
    """Gradients of every sample's loss by the flattened leaves of ``params``, ``[N, D]``.

    The model is changed (eval mode, ``.grad``): pass a copy. A tensor that does not appear in the
    loss has a gradient of zero.
    """
    model.eval()
    params = list(params)
    leaves = [module._parameters.get(f"{name}_orig", None) for module, name in params]
    leaves = [
        module._parameters[name] if leaf is None else leaf
        for leaf, (module, name) in zip(leaves, params, strict=True)
    ]
    rows = []
    for sample in (sample for batch in data for sample in _singles(batch)):
        model.zero_grad(set_to_none=True)
        _loss(model, sample, loss_fn).backward()
        rows.append(torch.cat([_gradient(leaf).flatten() for leaf in leaves]))
    return torch.stack(rows)


def _singles(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        for i in range(len(next(iter(batch.values())))):
            yield {key: value[i : i + 1] for key, value in batch.items()}
    else:
        inputs, target = batch
        for i in range(len(target)):
            yield inputs[i : i + 1], target[i : i + 1]


def _loss(model: nn.Module, sample: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> Tensor:
    if isinstance(sample, Mapping):
        return model(**sample).loss
    assert loss_fn is not None
    return loss_fn(model(sample[0]), sample[1])


def _gradient(leaf: Tensor | None) -> Tensor:
    assert leaf is not None
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
