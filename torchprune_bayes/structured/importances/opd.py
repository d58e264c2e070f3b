"""Optimal posterior damage of whole units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from torchprune_bayes._checks import check_choice
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError
from torchprune_bayes.laplace import (
    LaplaceOptions,
    Posterior,
    PriorStructure,
    fit_posterior,
)
from torchprune_bayes.laplace.posterior import MODES
from torchprune_bayes.structured.groups import Kept, UnitGroup
from torchprune_bayes.structured.importance import UnitImportance
from torchprune_bayes.structured.slicing import plan_of
from torchprune_bayes.types import Scores

_ROLES = {
    "rows": ("producer",),
    "columns": ("consumer",),
    "all": ("producer", "norm", "consumer"),
}


class OPDImportance(UnitImportance):
    """Sum of the posterior damage ``P_ii θ_i²`` over the weights of a unit.

    The structured form of `SpaM (Dhahri et al., 2024) <https://arxiv.org/abs/2402.15978>`_: a
    neuron or a filter is worth the sum over its row, over all layers that are coupled to it.
    Tensors that the posterior does not have, as biases and norms where it is of weights alone,
    count nothing.

    Args:
        posterior: A :class:`~torchprune_bayes.laplace.Posterior` at the model's weights, of
            :class:`~torchprune_bayes.training.SpaM` or ``Posterior.from_laplace``. Over the steps
            of :func:`~torchprune_bayes.structured.shrink` it is cut along with the model.
        calibration: In its place, data, model and loss: the posterior is then fitted here, before
            every step, with the prior of highest evidence.
        members: ``"rows"``, of the layers that make the units, as in the paper; ``"columns"``, of
            the layers that read them; ``"all"``, with the norms between.
        mode: ``"opd"``, ``"posterior"`` or ``"obd"``, see
            :meth:`~torchprune_bayes.laplace.Posterior.scores`.
        prior: Structure of the prior to fit.
        options: Of the fit, see :class:`~torchprune_bayes.laplace.LaplaceOptions`.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is not one of posterior and calibration.

    Cost: ``8D`` bytes, and with a calibration one or a few passes over the data at every step.

    Example:
        >>> import torch
        >>> from torchprune_bayes.structured.groups import UnitSlice
        >>> model = nn.Linear(2, 3, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> h = torch.tensor([[1.0, 1.0], [4.0, 0.0], [0.0, 0.0]])
        >>> importance = OPDImportance(Posterior({"weight": model.weight}, {"weight": h}))
        >>> rows = UnitSlice("weight", 0, torch.arange(3).unsqueeze(1), "producer")
        >>> importance.score(UnitGroup("", "hidden", 3, (rows,)), model)
        tensor([4., 6., 2.], dtype=torch.float64)
    """

    def __init__(
        self,
        posterior: Posterior | None = None,
        *,
        calibration: Calibration | None = None,
        members: str = "rows",
        mode: str = "opd",
        prior: str = "layerwise",
        **options: Any,
    ) -> None:
        check_choice("members", members, _ROLES)
        check_choice("mode", mode, MODES)
        if (posterior is None) == (calibration is None):
            raise ArgumentTypeError(
                "Expected one of `posterior` and `calibration`, got "
                f"{'neither' if posterior is None else 'both'}."
            )
        self._calibration, self._mode = calibration, mode
        self._roles = _ROLES[members]
        self._prior = PriorStructure.of(prior)
        self._options = LaplaceOptions(**options)
        self.needs_recalibration = posterior is None
        self._scores: Scores | None = None if posterior is None else posterior.scores(mode)

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Fit the posterior, if there is a calibration.

        Raises:
            CalibrationError: If the data gave no usable curvature.
        """
        if self._calibration is not None:
            posterior = fit_posterior(self._calibration, **asdict(self._options))
            self._scores = posterior.with_best_prior(self._prior).scores(self._mode)

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Sum over the tensors of a group that the posterior has; ``None`` if it has none.

        Raises:
            AlignmentError: If the posterior is of other shapes than the model.
        """
        pieces = [piece for piece in group.slices if piece.role in self._roles]
        if self._is_stale(model):
            self.prepare(model, [group])
        found = self._scores or {}
        total = None
        for piece in pieces:
            if piece.name not in found:
                continue
            values = found[piece.name]
            if values.shape != model.get_parameter(piece.name).shape:
                raise AlignmentError(
                    f"Expected a posterior of `{piece.name}` of shape "
                    f"{tuple(model.get_parameter(piece.name).shape)}, got {tuple(values.shape)}."
                )
            own = _sum_over_units(values, piece.dim, piece.positions)
            total = own if total is None else total + own
        return total

    def update(
        self, model: nn.Module, groups: Sequence[UnitGroup], kept: Kept
    ) -> dict[str, Tensor] | None:
        """Cut the scores as the model is about to be cut; its values stay."""
        if self._scores is not None:
            plan = plan_of(model, groups, kept)
            self._scores = {name: plan.cut(name, value) for name, value in self._scores.items()}
        return None

    def _is_stale(self, model: nn.Module) -> bool:
        """Whether there is a calibration and the host has pruned since it was last used."""
        if self._calibration is None:
            return False
        held = self._scores
        return held is None or any(
            model.get_parameter(name).shape != value.shape for name, value in held.items()
        )


def _sum_over_units(values: Tensor, dim: int, positions: Tensor) -> Tensor:
    along = values.movedim(dim, 0).flatten(1).sum(1) if values.ndim > 1 else values
    return along[positions.to(along.device)].sum(1)
