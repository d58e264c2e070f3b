"""Bayesian model reduction of a Laplace posterior: pruning without an amount."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from torchprune_bayes._numerics.gaussian_evidence import delta_f_gaussian
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import LayerCurvature
from torchprune_bayes.laplace import LaplaceOptions, Posterior
from torchprune_bayes.laplace.fitting import Kind, Structure
from torchprune_bayes.methods._posterior import PosteriorPruning
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision, Scores


@register(
    "laplace-evidence",
    title="weights whose removal raises the evidence of a Laplace posterior",
    paper="arXiv:2406.01345, doi:10.1016/j.neuroimage.2011.03.062",
)
class LaplaceEvidence(PosteriorPruning):
    """Prune each weight whose removal raises the evidence, and no more.

    Bayesian model reduction asks for the evidence of the model whose prior holds a weight at zero
    (Wright, Igel and Selvan 2024, arXiv:2406.01345, equation 6). For the Gaussian posterior of a
    Laplace approximation under a prior ``N(0, 1/δ)`` it is known in closed form, the Savage-Dickey
    ratio ΔF = −½ log(s² δ) − m²/(2 s²) of a weight with mean m and variance s². It is the posterior
    damage of :class:`OPD` plus an Occam term, which gives the ranking a zero to stop at.

    Args:
        amount: ``None`` prunes where ΔF ≥ −``tau``; a fraction or number of the remaining entries
            prunes exactly that many, those with the largest ΔF.
        calibration: Data, model and loss.
        posterior: A :class:`~torchprune_bayes.laplace.Posterior` at the model's weights, fitted
            already.
        model: The model of ``posterior`` or ``curvature``, instead of a calibration; its
            :func:`~torchprune_bayes.prunable_parameters` in these are pruned.
        tau: Evidence against the removal that is tolerated; 0 is exact.
        prior: Structure of the prior to fit: ``"scalar"``, ``"layerwise"``, ``"unitwise"``,
            ``"diag"``.
        curvature: A :class:`~torchprune_bayes.LayerCurvature` at the model's weights, fitted
            already, instead of a pass over the data.
        structure: Of the curvature to fit: ``"diagonal"`` or ``"kronecker"``.
        kind: ``"monte_carlo"``, ``"ggn"`` or ``"empirical"``.
        num_data: Samples the model was trained on; default ``Calibration.num_data``. The evidence
            counts them, so that fewer prune more.
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
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, -0.1, 2.0]]))
        >>> fitted = Posterior({"weight": layer.weight}, {"weight": torch.full((1, 3), 9.0)})
        >>> prune_global(
        ...     None, LaplaceEvidence, amount=None, posterior=fitted, model=layer
        ... ).masks["weight"]
        tensor([[ True, False,  True]])
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None = None,
        *,
        calibration: Calibration | None = None,
        curvature: LayerCurvature | None = None,
        posterior: Posterior | None = None,
        model: nn.Module | None = None,
        tau: float = 0.0,
        prior: str = "layerwise",
        structure: Structure = "diagonal",
        kind: Kind = "monte_carlo",
        num_data: int | None = None,
        scope: str = "global",
    ) -> None:
        super().__init__(
            0.0 if amount is None else amount,
            calibration=calibration,
            curvature=curvature,
            posterior=posterior,
            model=model,
            prior=prior,
            fit=LaplaceOptions(structure=structure, kind=kind, num_data=num_data),
            scope=scope,
        )
        self.tau = tau
        self._stops_itself = amount is None

    def decide(self, space: ParameterSpace) -> Decision:
        """Prune where the evidence rises, or rank by how much it does.

        Args:
            space: The tensors to prune, all in the posterior.

        Raises:
            AlignmentError: If the posterior is of other tensors or other weights.
            CalibrationError: If the data gave no usable curvature.
        """
        masks = space.masks()
        posterior = self.posterior_at(space)
        scores = {name: -value for name, value in delta_f_of(posterior, space).items()}
        if self._stops_itself:
            kept = {name: mask & (scores[name] > self.tau) for name, mask in masks.items()}
        else:
            kept = Target(masks, self.amount, scope=self.scope).keep(0, scores, masks)
        gone = {name: masks[name] & ~kept[name] for name in masks}
        change = -sum(float(scores[name][removed].sum()) for name, removed in gone.items())
        return Decision(kept, scores=scores, info={"delta_f": change})


def delta_f_of(posterior: Posterior, space: ParameterSpace) -> Scores:
    """Change of the log evidence when each weight is removed by itself, float64 by name."""
    scores: dict[str, Tensor] = {}
    for tensor in space:
        name, device = tensor.name, tensor.value.device
        scores[name] = delta_f_gaussian(
            tensor.value,
            posterior.variance(name).to(device),
            posterior.prior.values(name).to(device),
        )
    return scores
