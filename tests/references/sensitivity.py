"""Sensitivities, flows and schedules from their definitions: gates, Hessians and paths, float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Any, Tensor], Tensor]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The matrices and kernels of a model by name, detached copies."""
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if name.endswith("weight") and p.ndim > 1}


def gate_gradients(
    model: nn.Module,
    loss_fn: Loss,
    x: Tensor,
    y: Tensor,
    weights: Mapping[str, Tensor],
    gates: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """``∂L/∂c`` for explicit gates ``c`` in ``L(c ⊙ w)``, at the given gates."""
    leaves = {name: gate.clone().requires_grad_() for name, gate in gates.items()}
    gated = {name: leaves[name] * weights[name] for name in leaves}
    loss = loss_fn(functional_call(model, gated, (x,)), y)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def summed_over_training_batches(
    model: nn.Module,
    loss_fn: Loss,
    batches: Sequence[tuple[Tensor, Tensor]],
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """``w ∂L/∂w`` of the mean loss, each batch as a training loop runs it, dropout apart.

    The model and its running statistics change.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
    model.zero_grad()
    samples = sum(len(y) for _, y in batches)
    for x, y in batches:
        (loss_fn(model(x), y) * len(y) / samples).backward()
    return {name: weight * _gradient(model, name) for name, weight in weights.items()}


def _gradient(model: nn.Module, name: str) -> Tensor:
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return gradient


def ones_like(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(weight) for name, weight in weights.items()}


def flat_loss(
    model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The weights as one vector, and the loss as a function of it."""
    weights = weights_of(model)
    sizes = [weight.numel() for weight in weights.values()]

    def loss(vector: Tensor) -> Tensor:
        pieces = zip(weights.items(), vector.split(sizes), strict=True)
        values = {name: piece.view_as(weight) for (name, weight), piece in pieces}
        return loss_fn(functional_call(model, values, (x,)), y)

    return torch.cat([weight.flatten() for weight in weights.values()]), loss


def gradient_flow(loss: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """Squared norm of the gradient."""
    leaf = vector.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    return gradient.square().sum()


def path_flows(matrices: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Sum over all paths of the products of absolute weights, and the part through each weight."""
    widths = [matrices[0].shape[1], *(matrix.shape[0] for matrix in matrices)]
    through = [torch.zeros_like(matrix) for matrix in matrices]
    total = 0.0
    for path in product(*map(range, widths)):
        value = 1.0
        for matrix, start, stop in zip(matrices, path, path[1:], strict=False):
            value *= abs(float(matrix[stop, start]))
        total += value
        for found, start, stop in zip(through, path, path[1:], strict=False):
            found[stop, start] += value
    return total, through


def published_snipit(
    model: nn.Module, x: Tensor, y: Tensor, limit: float, steps: int
) -> dict[str, Tensor]:
    """The published loop: summed negative logits of the labels, ``e > θ`` over all entries.

    Each step ranks by ``|w ∂L/∂w / (L + 1e-8)|``, keeps what is above the ``int(N(1 − k))``-th
    largest score, and intersects with the last mask.
    """
    targets, missing = [0.5], limit - 0.5
    for _ in range(steps):
        targets.append(targets[-1] + missing / 2)
        missing /= 2
    weights = weights_of(model)
    masks = ones_like(weights)
    for target in [*targets, limit]:
        current = {name: weights[name] * masks[name] for name in weights}
        leaves = {name: value.requires_grad_() for name, value in current.items()}
        logits = functional_call(model, leaves, (x,))
        loss = -logits[torch.arange(len(y)), y].mean()
        found = torch.autograd.grad(loss, list(leaves.values()))
        scores = {
            name: (leaf * gradient / (loss + 1e-8)).abs().detach()
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
        }
        flat = torch.cat([score.flatten() for score in scores.values()])
        keep = min(max(int(len(flat) * (1 - target)), 1), len(flat))
        threshold = flat.topk(keep).values[-1]
        masks = {name: masks[name] * (scores[name] > threshold) for name in masks}
    return {name: mask.bool() for name, mask in masks.items()}
