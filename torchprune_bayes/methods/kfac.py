"""Optimal brain surgeon with the Kronecker-factored Fisher of each layer."""

from __future__ import annotations

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice, check_positive
from torchprune_bayes._numerics.kronecker import KroneckerInverse
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import KroneckerFactors
from torchprune_bayes.methods._curvature_holder import CurvatureHolder
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision


@register(
    "kfac",
    title="optimal brain surgeon with Kronecker factors",
    paper="arXiv:2004.14340",
)
class KFAC(CurvatureHolder[KroneckerFactors]):
    """Prune by ``w_q²/(2F⁻¹_qq)`` with ``F = G ⊗ A`` in each layer, and move the survivors.

    The K-FAC baseline of `WoodFisher (Singh and Alistarh, 2020)
    <https://arxiv.org/abs/2004.14340>`_: as there, removing weight ``q`` alone and moving the
    others of its layer optimally costs ``w_q²/(2F⁻¹_qq)``, and the survivors take the sum of these
    updates. With Kronecker factors (:class:`~torchprune_bayes.curvature.KroneckerFactors`) no
    matrix over the weights is formed: the diagonal of ``F⁻¹`` is ``diag(G⁻¹) diag(A⁻¹)ᵀ``, and the
    update of a weight matrix is ``−G⁻¹ V A⁻¹`` with ``V = w/diag F⁻¹`` where pruned, else zero.

    Args:
        amount: Fraction (float) or number (int) of the live entries to prune.
        calibration: Data, model and loss; every sample counts, whatever the mini-batch.
        curvature: :class:`~torchprune_bayes.curvature.KroneckerFactors` fitted already.
        damping: ``λ``; the factors are damped by ``√(λπ)`` (A) and ``√(λ/π)`` (G). The paper takes
            1e-5; on MLPNet the result is then worse, and gets worse with more samples.
        pi: Whether ``π`` is the ratio of the mean eigenvalues of ``A`` and ``G``, which gives both
            factors the same relative damping; otherwise 1, as in the paper.
        update: ``"none"`` only selects; ``"single"`` adds up the updates for removing each weight
            alone.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is neither calibration nor curvature.
        AlignmentError: If the curvature was fitted to other entries.
        ParameterError: If a layer is not linear and no convolution without groups.

    Cost per layer, beside one pass over the data: ``in³ + out³`` multiplications and about
    ``16(in² + out²)`` bytes.

    Example:
        >>> from torchprune_bayes import prune_global
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))
        >>> data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(4)]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> decision = prune_global(None, KFAC, amount=0.5, calibration=calibration)
        >>> sum(int(mask.sum()) for mask in decision.masks.values())
        88
    """

    def __init__(
        self,
        amount: float | int,
        *,
        calibration: Calibration | None = None,
        curvature: KroneckerFactors | None = None,
        damping: float = 1e-2,
        pi: bool = True,
        update: str = "single",
        scope: str = "global",
    ) -> None:
        super().__init__(amount, calibration=calibration, curvature=curvature, scope=scope)
        check_positive("damping", damping)
        check_choice("update", update, ("none", "single"))
        self.damping, self.pi, self.update = damping, pi, update

    def decide(self, space: ParameterSpace) -> Decision:
        """Choose masks and new weights of the survivors; the model is not changed.

        Args:
            space: The calibration's parameters.

        Raises:
            CalibrationError: If the data gave no usable factors.
            NumericalError: If a factorisation failed.
        """
        weights, masks = space.values(), space.masks()
        factors = self.curvature
        if factors is None:
            factors = KroneckerFactors().fit(self.required_calibration, weights, masks)
        factors.check_fitted_to(masks)
        inverses = {name: factors.inverse(name, self.damping, pi=self.pi) for name in weights}
        ratios = {name: _over_diagonal(weights[name], inverses[name]) for name in weights}
        scores = {name: weights[name] * ratio / 2 for name, ratio in ratios.items()}
        kept = Target(masks, self.amount, scope=self.scope).keep(0, scores, masks)
        updates = None
        if self.update == "single":
            updates = {
                name: _moved(weights[name], ratios[name], kept[name], inverses[name])
                for name in weights
            }
        info = {"samples": factors.count, "damping": self.damping, "pi": self.pi}
        return Decision(kept, updates, scores, info)


def _over_diagonal(weight: Tensor, inverse: KroneckerInverse) -> Tensor:
    """``w / diag F⁻¹``, float64."""
    return weight.double() / inverse.diagonal().reshape(weight.shape).to(weight.device)


def _moved(weight: Tensor, ratio: Tensor, keep: Tensor, inverse: KroneckerInverse) -> Tensor:
    """New values ``w − F⁻¹V`` of the kept weights, zero for the others."""
    pruned = torch.where(keep, 0.0, ratio).flatten(1)
    change = inverse.solve(pruned).reshape(weight.shape).to(weight.device)
    return torch.where(keep, weight - change, 0.0).to(weight.dtype)
