"""Gates on all readers of a unit: derivatives of losses by them, from weight gradients.

Multiply every weight that reads unit ``u``, in all layers, by a gate ``c_u``, which is 1. At 0 the
unit is removed, whatever precedes it. The derivative of a loss by the gate is ``Σ w g`` over these
weights: signed, so that effects cancel or add up as in the removal of the unit.

Dimensions of queries and keys are read by no layer, but by each other: a gate on their product has
the derivative ``Σ w g`` over the weights and biases that produce the queries, and equally over
those that produce the keys. Half of each is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.calibration.line_sums import line_sums, summed
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.structured.groups import UnitSlice
from torchprune_bayes.structured.importances._calibrated import space_of, sums_along

Gated = Mapping[str, Sequence[tuple[UnitSlice, float]]]
"""What carries the gates of a group and how much of it counts, by its name."""


class Gates:
    """Gates of groups, on a calibration of just the weights that carry them.

    Args:
        calibration: Data, model and loss.
        gated: What carries the gates of each group.
    """

    def __init__(self, calibration: Calibration, gated: Gated) -> None:
        pieces = [piece for held in gated.values() for piece, _ in held]
        space, self._names = space_of(calibration.model, pieces)
        self.calibration = calibration.with_space(space)
        self._gated = gated
        self._lines: dict[str, list[int]] = {name: [] for name in space.values()}
        for piece in pieces:
            dims = self._lines.get(self._names.get(piece.name, ""), [])
            if piece.dim not in dims:
                dims.append(piece.dim)

    def mean(self) -> dict[str, Tensor]:
        """Derivatives of the mean loss, ``[units]``; one backward pass."""
        gradients = self.calibration.mean_gradient()
        values = self.calibration.space.values()
        sums = {
            (name, dim): summed(gradients[name] * values[name].to(gradients[name]), dim)
            for name, dims in self._lines.items()
            for dim in dims
        }
        return self._derivatives(sums)

    def mean_squares(self) -> dict[str, Tensor]:
        """``mean_n (∂ℓ_n/∂c)²``, ``[units]``; cost of :func:`line_sums`."""
        totals: dict[str, Tensor] = {}
        for sums in line_sums(self.calibration, self._lines):
            for group, result in self._derivatives(sums).items():
                squares = result.square().sum(0)
                totals[group] = totals[group] + squares if group in totals else squares
        return {name: total / self.calibration.num_gradients for name, total in totals.items()}

    def _derivatives(self, sums: Mapping[tuple[str, int], Tensor]) -> dict[str, Tensor]:
        """Derivatives by the gates, float64 ``[..., units]`` by the name of the group."""
        result = {}
        for group, pieces in self._gated.items():
            each = [
                share * sums[line][..., piece.positions.to(sums[line].device)].sum(-1)
                for piece, share in pieces
                if (line := (self._names.get(piece.name, ""), piece.dim)) in sums
            ]
            if each:
                result[group] = torch.stack(each).sum(0)
        return result


def gate_precisions(
    calibration: Calibration, posterior: Posterior, gated: Gated, samples: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Precisions of gates under a posterior of the weights that carry them.

    With the weights ``w_u`` under a gate, the prior ``N(0, 1/δ_i)`` of each makes one of precision
    ``p_u = Σ δ_i w_i²`` for the gate, with mean 0. The empirical Fisher of the gate adds
    ``h_u = N mean_n (∂ℓ_n/∂c_u)²``.

    Args:
        calibration: The data that the posterior was fitted to. A gradient of ``m`` samples
            counts ``m`` times.
        posterior: Gives the prior precisions.
        gated: What carries the gates; groups with a tensor that the posterior does not have are
            left out.
        samples: ``N``, with all factors that the loss of a sample has in the posterior.

    Returns:
        ``h_u`` and ``p_u``, ``[units]`` float64, by the name of the group.
    """
    known = {
        name: pieces
        for name, pieces in gated.items()
        if pieces and all(piece.name in posterior.mean for piece, _ in pieces)
    }
    if not known:
        return {}
    together = calibration.num_samples / calibration.num_gradients
    squares = Gates(calibration, known).mean_squares()
    result = {}
    for name, pieces in known.items():
        prior = [
            sums_along(posterior.prior.values(p.name) * posterior.mean[p.name].double().square(), p)
            for p, _ in pieces
        ]
        data = posterior.scale * samples * together * squares[name]
        result[name] = (data, torch.stack(prior).sum(0).to(data.device))
    return result
