"""Bayesian model reduction of a Laplace posterior, for whole units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.gaussian_evidence import delta_f_gaussian
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.structured.groups import Kept, UnitGroup, UnitSlice
from torchprune_bayes.structured.importance import UnitImportance


class LaplaceEvidenceImportance(UnitImportance):
    """Minus the change of the log evidence when nothing reads a unit any more.

    The change is the Savage-Dickey ratio of arXiv:2406.01345, equation 6, for Gaussian posteriors,
    summed over the weights that read the unit. Once they are zero, the data say nothing about those
    that make it, which the evidence then no longer depends on. With ``shrink(..., target=
    "evidence")`` what has a score below zero goes, and no more.

    Args:
        posterior: A Laplace posterior at the model's weights, of all layers that are to shrink.
        tau: Evidence against the removal of a unit that is put up with; 0 is exact.

    Cost: elementwise, in float64; eight bytes for each weight of the posterior.

    Example:
        >>> from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
        >>> layer = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[2.0, 0.1]]))
        >>> posterior = Posterior({"weight": layer.weight}, {"weight": torch.ones(1, 2) * 9})
        >>> reads = UnitSlice("weight", 1, torch.arange(2)[:, None], "consumer")
        >>> importance = LaplaceEvidenceImportance(posterior)
        >>> importance.score(UnitGroup("before", "hidden", 2, (reads,)), layer) < 0
        tensor([False,  True])
    """

    threshold = 0.0

    def __init__(self, posterior: Posterior, *, tau: float = 0.0) -> None:
        super().__init__()
        self.tau = tau
        self._taken = {
            name: delta_f_gaussian(mean, posterior.variance(name), posterior.prior.values(name))
            for name, mean in posterior.mean.items()
        }
        self._current = dict(self._taken)

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Start from the evidence as it was taken."""
        self._current = dict(self._taken)

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Minus the joint change of each unit.

        Args:
            group: Units that go together.
            model: The model.

        Returns:
            Float64 ``[units]``; ``None`` where a layer that reads them is not in the posterior.
        """
        readers = [piece for piece in group.slices if piece.role == "consumer"]
        if not readers or any(piece.name not in self._current for piece in readers):
            return None
        total = torch.stack([self._change_of(piece) for piece in readers]).sum(0)
        return -(total + self.tau)

    def update(self, model: nn.Module, groups: Sequence[UnitGroup], kept: Kept) -> None:
        """Follow a cut. No weights move."""
        gone: dict[str, dict[int, list[Tensor]]] = {}
        for group in groups:
            if group.name not in kept:
                continue
            stays = torch.zeros(group.units, dtype=torch.bool)
            stays[kept[group.name].cpu()] = True
            for piece in group.slices:
                if piece.name in self._current:
                    dims = gone.setdefault(piece.name, {})
                    dims.setdefault(piece.dim, []).append(piece.positions.cpu()[~stays].flatten())
        for name, dims in gone.items():
            for dim, entries in dims.items():
                change = self._current[name]
                stay = torch.ones(change.shape[dim], dtype=torch.bool)
                stay[torch.cat(entries)] = False
                self._current[name] = change.index_select(
                    dim, stay.nonzero().flatten().to(change.device)
                )

    def _change_of(self, piece: UnitSlice) -> Tensor:
        change = self._current[piece.name]
        columns = change.movedim(piece.dim, 0).flatten(1).sum(1)
        return columns[piece.positions.to(columns.device)].sum(1).cpu()
