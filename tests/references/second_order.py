"""Slow float64 twins: gradients sample by sample, Hessians and Kronecker products written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

LossFunction = Callable[[Tensor, Tensor], Tensor]


def gradients_one_by_one(
    model: nn.Module, names: list[str], x: Tensor, y: Tensor, loss_fn: LossFunction
) -> dict[str, Tensor]:
    """One backward pass per sample; ``{name: [samples, *shape]}``."""
    weights = [dict(model.named_parameters())[name] for name in names]
    rows = [
        torch.autograd.grad(loss_fn(model(x[n : n + 1]), y[n : n + 1]), weights)
        for n in range(len(x))
    ]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}


def dense_hessian(
    model: nn.Module, names: list[str], x: Tensor, y: Tensor, loss_fn: LossFunction
) -> Tensor:
    """Hessian of the mean loss by all entries of the named weights, ``[D, D]``."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    shapes = [parameters[name].shape for name in names]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        replaced = {
            name: piece.reshape(shape)
            for name, piece, shape in zip(names, pieces, shapes, strict=True)
        }
        return loss_fn(functional_call(model, parameters | replaced, (x,)), y)

    start = torch.cat([parameters[name].flatten() for name in names])
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
        hessian = torch.autograd.functional.hessian(loss, start)
    assert isinstance(hessian, Tensor)
    return hessian


def damped_kronecker_product(rows: Tensor, columns: Tensor, damping: float, *, pi: bool) -> Tensor:
    """``(R + √(λ/π) I) ⊗ (C + √(λπ) I)`` with ``π = (tr C dim R)/(tr R dim C)`` or 1."""
    r, c = len(rows), len(columns)
    ratio = float(columns.trace() * r / (rows.trace() * c)) if pi else 1.0
    damped_rows = rows + (damping / ratio) ** 0.5 * torch.eye(r, dtype=rows.dtype)
    damped_columns = columns + (damping * ratio) ** 0.5 * torch.eye(c, dtype=rows.dtype)
    return torch.kron(damped_rows, damped_columns)
