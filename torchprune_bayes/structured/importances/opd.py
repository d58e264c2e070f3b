"""Optimal posterior damage of whole units."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchprune_bayes._checks import check_choice
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.laplace.posterior import MODES
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.importances._calibrated import pieces_of
from torchprune_bayes.structured.importances._posterior import PosteriorImportance

_ROLES = {
    "rows": ("producer",),
    "columns": ("consumer",),
    "all": ("producer", "norm", "consumer"),
}


class OPDImportance(PosteriorImportance):
    """Sum of the posterior damage ``P_ii θ_i²`` over the weights of a unit.

    The structured form of `SpaM (Dhahri et al., 2024) <https://arxiv.org/abs/2402.15978>`_: a
    neuron or a filter is scored by the sum over its row, over all layers that are coupled to it.
    Tensors that the posterior does not have, as biases and norms where it is of weights alone,
    do not contribute.

    Weights of a unit are removed jointly, and the diagonal does not say whether their effects
    cancel. ``members="gate"`` scores a unit as a whole: ``½ (h_u + p_u)``, the fall of the log
    posterior when a gate on all that reads it closes, with the empirical Fisher ``h_u = N mean_n (Σ
    w·g_n)²`` of the gate in the place of a diagonal, and ``p_u = Σ δ_i w_i²`` of the prior. Only
    such scores are divided by what a unit costs.

    Args:
        calibration: Data, model and loss: the posterior is fitted here, before every step and
            whenever weights have moved or were cut, with the prior of highest evidence. Or a
            posterior, as below.
        posterior: A :class:`~torchprune_bayes.laplace.Posterior` at the model's weights, of
            :class:`~torchprune_bayes.training.SpaM` or ``posterior_from_laplace``. Over the steps
            of :func:`~torchprune_bayes.structured.shrink` it is cut along with the model; after a
            cut by another pruner it is refused.
        members: ``"rows"``, of the layers that make the units, as in the paper; ``"columns"``, of
            the layers that read them; ``"all"``, with the norms between; ``"gate"``, all that reads
            a unit as a whole, which takes a calibration.
        mode: ``"opd"``, ``"posterior"`` or ``"obd"``, see
            :meth:`~torchprune_bayes.laplace.Posterior.scores`; ``"obd"`` of a gate is ``½ h_u``.
        prior: Structure of the prior to fit.
        options: Of the fit, see :class:`~torchprune_bayes.laplace.LaplaceOptions`.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is not one of posterior and calibration.

    Cost: ``8D`` bytes, and with a calibration one or a few passes over the data at every step;
    with gates one pass of gradients more.

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
        calibration: Calibration | Posterior | None = None,
        *,
        posterior: Posterior | None = None,
        members: str = "rows",
        mode: str = "opd",
        prior: str = "layerwise",
        **options: Any,
    ) -> None:
        check_choice("members", members, (*_ROLES, "gate"))
        check_choice("mode", mode, MODES)
        self.joint = members == "gate"
        if self.joint and mode == "posterior":
            raise ArgumentError(
                "Expected mode='opd' or 'obd' for members='gate', got 'posterior': the precision "
                "of a gate has the weights in it."
            )
        self._roles, self._mode = _ROLES.get(members, ()), mode
        super().__init__(
            calibration,
            posterior,
            lambda p: p.scores(mode),
            gated=self.joint,
            prior=prior,
            options=options,
        )

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Sum over the tensors of a group that the posterior has; ``None`` if it has none.

        Raises:
            AlignmentError: If the posterior is of other shapes than the model.
        """
        if self._gated:
            gate = self.gate(group, model)
            if gate is None:
                return None
            data, prior = gate
            return 0.5 * (data + prior if self._mode == "opd" else data)
        result = list(self.sums(group, model, pieces_of(group, *self._roles)))
        return sum(result[1:], start=result[0]) if result else None
