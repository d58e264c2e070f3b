"""Importances with known scores, and recounts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tests.references.flops import flops_without_fused_kernels
from torchprune_bayes.structured import UnitImportance
from torchprune_bayes.structured.groups import UnitGroup


class RowNorm(UnitImportance):
    """The norm of the first producer's rows, and a record of the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        self.calls.append("prepare")

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        self.calls.append(group.name)
        piece = group.slices[0]
        rows = model.get_parameter(piece.name).detach().movedim(piece.dim, 0)
        return rows[piece.positions.reshape(-1)].reshape(group.units, -1).norm(dim=1)


class Fixed(UnitImportance):
    """Scores that are given."""

    threshold = 0.0

    def __init__(self, scores: dict[str, Tensor | None]) -> None:
        self.scores = scores

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        return self.scores.get(group.name)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, inputs: Tensor) -> int:
    return flops_without_fused_kernels(model, inputs)
