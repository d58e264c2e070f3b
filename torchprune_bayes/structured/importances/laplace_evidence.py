"""Bayesian model reduction of a Laplace posterior, for whole units."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice
from torchprune_bayes._numerics.gaussian_evidence import delta_f_gaussian
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.importances._calibrated import pieces_of
from torchprune_bayes.structured.importances._posterior import PosteriorImportance


class LaplaceEvidenceImportance(PosteriorImportance):
    """Minus the change of the log evidence when a unit is no longer read.

    The change is the Savage-Dickey ratio of arXiv:2406.01345, equation 6, for Gaussian posteriors,
    summed over the weights that read the unit. Once they are zero, the data say nothing about those
    that produce it, which the evidence then no longer depends on. With ``shrink(..., target=
    "evidence")`` exactly the units with a score below zero are removed.

    The sum assumes independent weights in a unit. ``members="gate"`` treats the unit as a
    whole: a gate on all that reads it has the prior ``N(0, 1/p_u)`` and the posterior
    ``N(1, 1/(h_u + p_u))``, with ``p_u = Σ δ_i w_i²`` and the empirical Fisher
    ``h_u = N mean_n (Σ w·g_n)²``, and the same ratio is taken of the gate. There is one Occam term
    for a unit, not one for each weight, so that fewer units are removed.

    Args:
        calibration: Data, model and loss: the posterior is fitted here, before every step and
            whenever weights have moved or were cut, with the prior of highest evidence. Or a
            posterior, as below.
        posterior: A Laplace posterior at the model's weights, of all layers that are to shrink.
            Over the steps of :func:`~torchprune_bayes.structured.shrink` its evidence is cut along
            with the model; after a cut by another pruner it is refused.
        members: ``"columns"``, the weights that read a unit, one by one; ``"gate"``, all of them
            together, which takes a calibration; ``"auto"``, gates where there is one. Ranked for a
            sparsity, sums over columns were behind chance on a ViT: units with many weights have
            more Occam terms and go first.
        tau: Evidence against the removal of a unit that is tolerated; 0 is exact.
        prior: Structure of the prior to fit.
        options: Of the fit, see :class:`~torchprune_bayes.laplace.LaplaceOptions`.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is not one of calibration and posterior.

    Cost: elementwise, in float64; eight bytes for each weight of the posterior, and with a
    calibration one or a few passes over the data at every step.

    Example:
        >>> from torchprune_bayes.structured.groups import UnitSlice
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

    def __init__(
        self,
        calibration: Calibration | Posterior | None = None,
        *,
        posterior: Posterior | None = None,
        members: Literal["auto", "columns", "gate"] = "auto",
        tau: float = 0.0,
        prior: str = "layerwise",
        **options: Any,
    ) -> None:
        check_choice("members", members, ("auto", "columns", "gate"))
        if members == "auto":
            members = "gate" if isinstance(calibration, Calibration) else "columns"
        self.tau, self.joint = tau, members == "gate"
        super().__init__(
            calibration,
            posterior,
            _evidence_changes,
            gated=members == "gate",
            prior=prior,
            options=options,
        )

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Minus the joint change of each unit.

        Args:
            group: Units that go together.
            model: The model.

        Returns:
            Float64 ``[units]``; ``None`` where a layer that reads them is not in the posterior.

        Raises:
            AlignmentError: If the posterior is of other shapes than the model.
        """
        readers = pieces_of(group, "consumer")
        if self._gated:
            gate = self.gate(group, model) if readers else None
            return None if gate is None else -(_change_of_gate(*gate) + self.tau)
        changes = list(self.sums(group, model, readers))
        if not readers or len(changes) < len(readers):
            return None
        return -(torch.stack(changes).sum(0) + self.tau)


def _change_of_gate(data: Tensor, prior: Tensor) -> Tensor:
    """``ΔF`` of each gate; without any weight under it, nothing changes."""
    empty = prior == 0
    precision = (data + prior).masked_fill(empty, 1.0)
    change = delta_f_gaussian(torch.ones_like(data), 1.0 / precision, prior.masked_fill(empty, 1.0))
    return change.masked_fill(empty, 0.0)


def _evidence_changes(posterior: Posterior) -> dict[str, Tensor]:
    """``ΔF`` of each weight."""
    return {
        name: delta_f_gaussian(mean, posterior.variance(name), posterior.prior.values(name))
        for name, mean in posterior.mean.items()
    }
