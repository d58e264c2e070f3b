"""Optimal brain surgeon with the Kronecker-factored Fisher of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice, check_positive
from torchprune_bayes._numerics.kronecker import DiagonalInverse, KroneckerInverse
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import LayerCurvature
from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.methods._curvature_holder import CurvatureHolder
from torchprune_bayes.methods._damping import ChosenDamping, best_damping
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision, Masks


@register(
    "kfac",
    title="optimal brain surgeon with Kronecker factors",
    paper="arXiv:2004.14340",
)
class KFAC(CurvatureHolder[LayerCurvature]):
    """Prune by ``w_q²/(2F⁻¹_qq)`` with ``F = G ⊗ A`` in each layer, and move what remains.

    The K-FAC baseline of `WoodFisher (Singh and Alistarh, 2020)
    <https://arxiv.org/abs/2004.14340>`_: as there, removing only weight ``q`` and moving the
    others of its layer optimally costs ``w_q²/(2F⁻¹_qq)``, and the remaining weights take the sum
    of these updates. With Kronecker factors (:class:`~torchprune_bayes.curvature.LayerCurvature`)
    no matrix over the weights is formed: the diagonal of ``F⁻¹`` is ``diag(G⁻¹) diag(A⁻¹)ᵀ``, and
    the update of a weight matrix is ``−G⁻¹ V A⁻¹`` with ``V = w/diag F⁻¹`` where pruned, else zero.
    Weights without factors (grouped convolutions, input projections of ``nn.MultiheadAttention``)
    have only the diagonal of ``F``, and do not move.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        calibration: Data, model and loss; every sample counts, whatever the mini-batch.
        curvature: A :class:`~torchprune_bayes.curvature.LayerCurvature` fitted already, with
            structure ``"kronecker"`` or ``"both"``.
        damping: ``λ``; the factors are damped by ``√(λπ)`` (A) and ``√(λ/π)`` (G). ``"auto"`` takes
            1e-4 to 1e3 times the mean curvature, whichever gives the smallest held-out loss; with
            a curvature and no calibration the mean curvature itself. The paper takes 1e-5 and no
            ``π``.
        pi: Whether ``π`` is the ratio of the mean eigenvalues of ``A`` and ``G``, which gives both
            factors the same relative damping; otherwise 1, as in the paper.
        update: ``"none"`` only selects; ``"single"`` adds up the updates for removing each weight
            alone.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is neither calibration nor curvature, or the curvature is none
            with Kronecker factors.
        AlignmentError: If the curvature was fitted to other entries.
        CalibrationError: If all gradients are zero, or no damping gives a finite held-out loss.

    Cost: one pass over the data; then for each damping that is tried (one if it is a number, else
    mostly four to six) ``in³ + out³`` multiplications and about ``16(in² + out²)`` bytes per layer,
    and the held-out samples forward.

    Example:
        >>> from torchprune_bayes import prune_global
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))
        >>> data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(4)]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> decision = prune_global(None, KFAC, amount=0.5, calibration=calibration)
        >>> sum(int(mask.sum()) for mask in decision.masks.values())
        88
    """

    curvature_type = LayerCurvature

    def __init__(
        self,
        amount: float | int,
        *,
        calibration: Calibration | None = None,
        curvature: LayerCurvature | None = None,
        damping: float | Literal["auto"] = "auto",
        pi: bool = True,
        update: Literal["none", "single"] = "single",
        scope: Literal["global", "layer"] = "global",
    ) -> None:
        super().__init__(amount, calibration=calibration, curvature=curvature, scope=scope)
        if damping != "auto":
            check_positive("damping", damping)
        check_choice("update", update, ("none", "single"))
        self.damping, self.pi, self.update = damping, pi, update

    def decide(self, space: ParameterSpace) -> Decision:
        """Choose masks and new weights of those that remain; the model is not changed.

        Args:
            space: The calibration's parameters.

        Raises:
            CalibrationError: If the data gave no usable factors.
            NumericalError: If a factorisation failed.
        """
        weights, masks = space.values(), space.masks()
        curvature = self.curvature
        if curvature is None:
            curvature = LayerCurvature(structure="kronecker")
            curvature.fit(self.required_calibration, weights, masks)
        curvature.check_fitted_to(masks)
        unit = curvature.mean()
        if not unit:
            raise CalibrationError(
                "Expected a loss that depends on the weights, got gradients of zero for all "
                "samples: check the loss and its labels."
            )
        step = _Step(weights, masks, curvature, self)
        if isinstance(self.damping, str):
            chosen = best_damping(step.decide, unit, self.calibration)
        else:
            chosen = ChosenDamping(step.decide(self.damping), self.damping)
        info: dict[str, Any] = {
            "samples": curvature.count,
            "damping": chosen.damping,
            "relative_damping": chosen.damping / unit,
            "dampings_tried": chosen.tried,
            "pi": self.pi,
        }
        if chosen.loss is not None:
            info |= {"loss": chosen.loss, "in_sample": chosen.in_sample}
        return replace(chosen.decision, info=info)


@dataclass(frozen=True)
class _Step:
    """Weights and their curvature; only the damping is open."""

    weights: Mapping[str, Tensor]
    masks: Masks
    curvature: LayerCurvature
    method: KFAC

    def decide(self, damping: float) -> Decision:
        """Result at the damping ``λ``."""
        method = self.method
        inverses = self.curvature.inverses(self.weights, damping, pi=method.pi)
        ratios = {name: _over_diagonal(w, inverses[name]) for name, w in self.weights.items()}
        scores = {name: w * ratios[name] / 2 for name, w in self.weights.items()}
        kept = Target(self.masks, method.amount, scope=method.scope).keep(0, scores, self.masks)
        updates = None
        if method.update == "single":
            updates = {
                name: _moved(w, ratios[name], kept[name], inverses[name])
                for name, w in self.weights.items()
            }
        return Decision(kept, updates, scores)


def _over_diagonal(weight: Tensor, inverse: KroneckerInverse | DiagonalInverse) -> Tensor:
    """``w / diag F⁻¹``, float64."""
    return weight.double() / inverse.diagonal().reshape(weight.shape).to(weight.device)


def _moved(
    weight: Tensor, ratio: Tensor, keep: Tensor, inverse: KroneckerInverse | DiagonalInverse
) -> Tensor:
    """New values ``w − F⁻¹V`` of the weights that remain, zero for the others."""
    pruned = torch.where(keep, 0.0, ratio).flatten(1)
    change = inverse.solve(pruned).reshape(weight.shape).to(weight.device)
    return torch.where(keep, weight - change, 0.0).to(weight.dtype)
