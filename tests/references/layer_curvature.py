"""Curvatures written out sample by sample, and position by position, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.references.gradients import per_sample_loop
from torchprune_bayes.params import ParameterSpace

Pairs = list[tuple[nn.Module, str]]


def empirical_diagonal(
    model: nn.Module, data: Iterable[Any], loss_fn: Any, pairs: Pairs, sums: Iterable[float] = ()
) -> dict[str, Tensor]:
    """``(1/N) Σ_n g_n²``; ``sums`` holds the numbers that the samples' mean losses are sums of."""
    space = ParameterSpace(model, pairs)
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    places = [
        (modules[tensor.name.rpartition(".")[0]], tensor.name.rpartition(".")[2])
        for tensor in space
    ]
    rows = per_sample_loop(twin, data, loss_fn, places)
    scale = torch.tensor(list(sums), dtype=rows.dtype) if sums else torch.ones(len(rows)).to(rows)
    diagonal = (rows * scale.unsqueeze(1)).square().mean(0)
    pieces = diagonal.split([tensor.leaf.numel() for tensor in space])
    return {
        tensor.name: piece.view_as(tensor.leaf) for tensor, piece in zip(space, pieces, strict=True)
    }


def jacobian(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Derivative of the output for one sample by the flattened parameters, ``[C, D]``."""
    output = model(x).flatten()
    rows = [
        torch.autograd.grad(f, list(parameters.values()), retain_graph=True, materialize_grads=True)
        for f in output
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def ggn(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``(1/N) Σ_n J_nᵀ (∂²ℓ_n/∂f_n²) J_n`` of all parameters, ``[D, D]``."""
    parameters = dict(model.named_parameters())
    total: Any = 0
    for n in range(len(x)):
        sample, label = x[n : n + 1], y[n : n + 1]
        J = jacobian(model, parameters, sample)
        f = model(sample).detach()
        H: Any = torch.autograd.functional.hessian(lambda f, label=label: loss_fn(f, label), f)
        total = total + J.mT @ H.reshape(len(J), len(J)) @ J
    return total / len(x)


def split(vector: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """A vector over all parameters, by name and in their shapes."""
    parameters = dict(model.named_parameters())
    pieces = vector.split([p.numel() for p in parameters.values()])
    return {name: v.view_as(parameters[name]) for name, v in zip(parameters, pieces, strict=True)}
