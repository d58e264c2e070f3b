"""Small networks whose forward pass takes explicit gates on units, and Fisher costs by definition.

Every network lists its gates by the name of the group they belong to. ``where`` says at which
place they multiply: what is read (``"read"``), or what a layer gives before its norm (``"made"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes.structured.groups import UnitGroup, UnitSlice

Gates = Mapping[str, Tensor]
_NONE: Gates = {}


class GatedResidual(nn.Module):
    """A stem and two blocks on one stream of channels, batch norms, and a linear head."""

    def __init__(self, width: int = 5, inner: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv1, self.norm1 = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, gates: Gates = _NONE, where: str = "read") -> Tensor:
        def gated(name: str, place: str, value: Tensor) -> Tensor:
            gate = gates.get(name)
            return value if gate is None or place != where else value * gate[:, None, None]

        stream = torch.relu(self.norm(gated("stem", "made", self.stem(x))))
        hidden = gated("conv1", "made", self.conv1(gated("stem", "read", stream)))
        hidden = gated("conv1", "read", torch.relu(self.norm1(hidden)))
        stream = torch.relu(stream + self.norm2(gated("stem", "made", self.conv2(hidden))))
        more = gated("stem", "made", self.conv3(gated("stem", "read", stream)))
        stream = torch.relu(stream + self.norm3(more))
        return self.head(gated("stem", "read", stream).mean((2, 3)))


class GatedFlat(nn.Module):
    """A convolution whose maps a linear layer reads flattened, then hidden units with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.fc1, self.fc2 = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, gates: Gates = _NONE, where: str = "read") -> Tensor:
        maps = self.conv(x)
        if where == "made" and "conv" in gates:
            maps = maps * gates["conv"][:, None, None]
        maps = torch.tanh(maps)
        if where == "read" and "conv" in gates:
            maps = maps * gates["conv"][:, None, None]
        hidden = self.fc1(maps.flatten(1))
        if where == "made" and "fc1" in gates:
            hidden = hidden * gates["fc1"]
        hidden = nn.functional.gelu(hidden)
        if where == "read" and "fc1" in gates:
            hidden = hidden * gates["fc1"]
        return self.fc2(hidden)


class GatedAttention(nn.Module):
    """Self-attention with a fused projection over ``[n, tokens, 6]``; gates on the heads."""

    heads, width = 3, 2

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.qkv, self.out, self.head = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, gates: Gates = _NONE, where: str = "read") -> Tensor:
        split = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.width))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        context = (q @ k.mT / self.width**0.5).softmax(-1) @ v  # [n, heads, tokens, width]
        if "qkv" in gates:
            context = context * gates["qkv"][:, None, None]
        return self.head((x + self.out(context.transpose(1, 2).flatten(2))).mean(1))

    def groups(self) -> list[UnitGroup]:
        """The heads: rows of query, key and value, and columns of the output projection."""
        columns = torch.arange(6).reshape(self.heads, self.width)
        rows = torch.cat([columns, columns + 6, columns + 12], dim=1)
        slices = (
            UnitSlice("qkv.weight", 0, rows, "producer"),
            UnitSlice("qkv.bias", 0, rows, "producer"),
            UnitSlice("out.weight", 1, columns, "consumer"),
        )
        return [UnitGroup("qkv", "head", self.heads, slices)]


def explicit_gate_gradients(
    model: nn.Module,
    units: Mapping[str, int],
    loss_fn: Callable[[Any, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    where: str,
) -> tuple[dict[str, Tensor], float]:
    """``∂L/∂c`` at ``c = 1`` for the gates of the named groups, by autograd; and the loss."""
    gates = {
        name: torch.ones(count, dtype=torch.float64, requires_grad=True)
        for name, count in units.items()
    }
    loss = loss_fn(model(x, gates, where), y)
    found = torch.autograd.grad(loss, list(gates.values()))
    return dict(zip(gates, found, strict=True)), float(loss.detach())


def sample_gradients(
    model: nn.Module, loss_fn: Callable[[Any, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Gradients of each sample's loss, ``[N, *shape]`` by name, one backward pass at a time."""
    rows: dict[str, list[Tensor]] = {}
    for i in range(len(x)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
        named = dict(model.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        for name, gradient in zip(named, found, strict=True):
            rows.setdefault(name, []).append(gradient)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def explicit_gate_squares(
    model: nn.Module,
    units: Mapping[str, int],
    loss_fn: Callable[[Any, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
) -> dict[str, Tensor]:
    """``mean_n (∂ℓ_n/∂c)²`` of gates on what is read, one sample after the other."""
    totals = {name: torch.zeros(count, dtype=torch.float64) for name, count in units.items()}
    for n in range(len(x)):
        own = x[n : n + 1], y[n : n + 1]
        found, _ = explicit_gate_gradients(model, units, loss_fn, *own, where="read")
        for name, gradient in found.items():
            totals[name] += gradient.square() / len(x)
    return totals


def gate_evidence(data: float, prior: float) -> float:
    """``log Z(c ~ N(0, 1/p)) − log Z(c = 0)`` for ``exp(−½ h (c − m)²)``, by integration.

    The likelihood is the quadratic in the gate whose posterior has its mean at 1.
    """
    place = (data + prior) / data  # so that (h m)/(h + p) = 1
    c = torch.linspace(-40.0, 42.0, 4_000_001, dtype=torch.float64)
    exponent = -0.5 * (data * (c - place).square() + prior * c.square())
    step = float(c[1] - c[0])
    log_integral = float(torch.logsumexp(exponent, 0)) + math.log(step)
    return 0.5 * math.log(prior / (2 * math.pi)) + log_integral + 0.5 * data * place**2


def entries_of(group: UnitGroup, unit: int, model: nn.Module) -> dict[str, Tensor]:
    """Which entries of which parameters a unit owns, as boolean masks."""
    named = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    for piece in group.slices:
        if piece.name in named:
            mask = masks.setdefault(piece.name, torch.zeros_like(named[piece.name]).bool())
            for position in piece.positions[unit].tolist():
                mask.select(piece.dim, position).fill_(True)
    return masks


def joint_obs_cost(fisher: Tensor, weights: Tensor, pruned: Tensor) -> float:
    """``½ w_Pᵀ((F⁻¹)_PP)⁻¹w_P`` with every inverse formed (arXiv 2004.14340, appendix)."""
    block = torch.linalg.inv(fisher)[pruned][:, pruned]
    return float(0.5 * weights[pruned] @ torch.linalg.inv(block) @ weights[pruned])
