"""Layers fitted on some of their inputs by one dense solve, with rows that autograd reads off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.conv import _ConvTransposeNd


def rows_and_outputs(layer: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The rows ``[n, d]`` that meet the weights of one output, and the outputs ``[n, o]``.

    An output is linear in its own weights, so that the derivative by these is the row.
    """
    weight = layer.weight.detach()
    along = _output_dim(layer)

    def first_output(own: Tensor) -> Tensor:
        moved = weight.movedim(along, 0).clone()
        moved = torch.cat([own[None], moved[1:]]).movedim(0, along)
        return _outputs_last(layer, functional_call(layer, {"weight": moved}, (inputs,)))[:, 0]

    own = weight.movedim(along, 0)[0]
    rows = torch.autograd.functional.jacobian(first_output, own).flatten(1)
    return rows, _outputs_last(layer, layer(inputs).detach())


def fitted(
    layer: Any,
    inputs: Tensor,
    gone: list[int],
    damping: float,
    *,
    intercept: bool,
) -> tuple[Tensor, Tensor]:
    """Weight and shift of the bias that minimise ``mean |y - W'x_K - b'|² + λ|W' - W_K|²``."""
    rows, outputs = rows_and_outputs(layer, inputs)
    channels = layer.weight.shape[1 - _output_dim(layer)]
    keep = torch.ones(channels, rows.shape[1] // channels, dtype=torch.bool)
    keep[gone] = False
    keep = keep.flatten()
    matrix = layer.weight.detach().movedim(_output_dim(layer), 0).flatten(1)
    inner = rows[:, keep]
    target = outputs - inner @ matrix[:, keep].T
    bias = getattr(layer, "bias", None)
    if bias is not None:
        target = target - bias.detach()
    if intercept:
        inner = inner - inner.mean(0)
        centre, target = target.mean(0), target - target.mean(0)
    size = inner.square().mean(0)[rows[:, keep].any(0)].mean()  # of inputs that are ever not zero
    ridge = (damping * size * len(rows)).sqrt() * torch.eye(inner.shape[1], dtype=rows.dtype)
    zeros = torch.zeros(inner.shape[1], target.shape[1], dtype=rows.dtype)
    move = torch.linalg.lstsq(torch.cat([inner, ridge]), torch.cat([target, zeros])).solution
    new = torch.zeros_like(matrix)
    new[:, keep] = matrix[:, keep] + move.T
    shift = torch.zeros(matrix.shape[0], dtype=rows.dtype)
    if intercept:
        shift = centre - rows[:, keep].mean(0) @ move
    moved = layer.weight.detach().movedim(_output_dim(layer), 0)
    return new.reshape(moved.shape).movedim(0, _output_dim(layer)), shift


def _output_dim(layer: Any) -> int:
    return int(isinstance(layer, _ConvTransposeNd) or type(layer).__name__ == "Conv1D")


def _outputs_last(layer: Any, outputs: Tensor) -> Tensor:
    convolution = hasattr(layer, "kernel_size")
    return (outputs.movedim(1, -1) if convolution else outputs).flatten(0, -2)
