"""Optimal posterior damage: pruning by the posterior of a Laplace approximation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from torchprune_bayes._checks import check_choice
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import LayerCurvature
from torchprune_bayes.laplace.fitting import Kind, LaplaceOptions, Structure
from torchprune_bayes.laplace.posterior import MODES, Posterior
from torchprune_bayes.methods._pattern import Pattern, kept_by
from torchprune_bayes.methods._posterior import PosteriorPruning
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision


@register("opd", title="optimal posterior damage", paper="arXiv:2402.15978")
class OPD(PosteriorPruning):
    """Prune the weights with the smallest ``P_ii θ_i²``, ``P`` the posterior precision.

    `SpaM (Dhahri et al., 2024) <https://arxiv.org/abs/2402.15978>`_: setting weight ``i`` to zero
    lowers the log posterior of a Laplace approximation, whose mean is the model, by half of this.
    ``P_ii = s H_ii + δ_i`` has the curvature ``H`` of the loss and the prior precision ``δ``; where
    ``δ`` is small this is optimal brain damage, where it is large, magnitude within what shares
    ``δ``. The weights that are kept do not move.

    It is made for models trained with :class:`~torchprune_bayes.training.SpaM`, whose posterior is
    handed in. For any other model the posterior is fitted to the calibration data here, with the
    prior of highest evidence.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        calibration: Data, model and loss.
        posterior: A :class:`~torchprune_bayes.laplace.Posterior` at the model's weights, fitted
            already; of SpaM, or :func:`~torchprune_bayes.laplace.posterior_from_laplace`.
        model: The model of ``posterior`` or ``curvature``, instead of a calibration; its
            :func:`~torchprune_bayes.prunable_parameters` in these are pruned.
        mode: ``"opd"``; ``"obd"``, ``s H_ii θ_i²``, leaves the prior out; ``"posterior"`` takes
            only ``P_ii``.
        prior: Structure of the prior to fit: ``"scalar"``, ``"layerwise"``, ``"unitwise"``,
            ``"diag"``.
        curvature: A :class:`~torchprune_bayes.LayerCurvature` at the model's weights, fitted
            already, instead of a pass over the data.
        structure: Of the curvature to fit: ``"diagonal"`` or ``"kronecker"``.
        kind: ``"monte_carlo"``, ``"ggn"`` or ``"empirical"``, see
            :func:`~torchprune_bayes.laplace.fit_posterior`.
        num_data: Samples the model was trained on; default ``Calibration.num_data``.
        smoothed: Whether Kronecker factors average the prior, as the paper's code does; else the
            diagonal of ``P`` is exact.
        pattern: ``"N:M"`` keeps ``N`` of every ``M`` inputs, ``"1xM"`` keeps or prunes ``M`` inputs
            together; with ``N:M`` the amount is ``1 − N/M``, and may be ``None``.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.

    Raises:
        AlignmentError: If the posterior is not one of these tensors at their weights.
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is neither calibration nor posterior and model.

    Cost: one or a few passes over the data if there is no posterior; ``8D`` bytes for the scores.

    Example:
        >>> import torch
        >>> from torchprune_bayes import prune_global
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, -1.0, 2.0]]))
        >>> curvature = {"weight": torch.tensor([[9.0, 1.0, 1.0]])}
        >>> fitted = Posterior({"weight": layer.weight}, curvature)
        >>> prune_global(None, OPD, amount=1, posterior=fitted, model=layer).masks["weight"]
        tensor([[ True, False,  True]])
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None,
        *,
        calibration: Calibration | None = None,
        curvature: LayerCurvature | None = None,
        posterior: Posterior | None = None,
        model: nn.Module | None = None,
        mode: str = "opd",
        prior: str = "layerwise",
        structure: Structure = "diagonal",
        kind: Kind = "monte_carlo",
        num_data: int | None = None,
        smoothed: bool = False,
        pattern: str | None = None,
        scope: str = "global",
    ) -> None:
        self.pattern = None if pattern is None else Pattern.parse(pattern)
        if self.pattern is not None:
            amount = self.pattern.amount(amount)
        super().__init__(
            amount,  # type: ignore[arg-type]
            calibration=calibration,
            curvature=curvature,
            posterior=posterior,
            model=model,
            prior=prior,
            fit=LaplaceOptions(structure=structure, kind=kind, num_data=num_data),
            scope=scope,
        )
        check_choice("mode", mode, MODES)
        self.mode, self.smoothed = mode, smoothed

    def decide(self, space: ParameterSpace) -> Decision:
        """Rank the remaining entries of ``space``.

        Args:
            space: The tensors to prune, all in the posterior.

        Raises:
            AlignmentError: If the posterior is of other tensors or other weights.
            CalibrationError: If the data gave no usable curvature.
        """
        masks = space.masks()
        posterior = self.posterior_at(space)
        all_scores = posterior.scores(self.mode, smoothed=self.smoothed)
        scores = {name: all_scores[name].to(mask.device) for name, mask in masks.items()}
        kept = kept_by(space, scores, self.amount, pattern=self.pattern, scope=self.scope)
        info = {
            "log_marginal_likelihood": posterior.log_marginal_likelihood(),
            "prior": posterior.prior.structure.value,
        }
        return Decision(kept, scores=scores, info=info)
