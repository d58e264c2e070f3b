"""GraSP: pruning that preserves the flow of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchprune_bayes._checks import check_positive
from torchprune_bayes.calibration import Calibration, batch_size
from torchprune_bayes.curvature.leaves import leaves_of
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods.registry import register
from torchprune_bayes.methods.sensitivity import SensitivityPruning, masked
from torchprune_bayes.types import Masks, Scores

_BATCH = 64
_LARGEST_BATCH = 512  # that of gradients: with statistics of batches, H and g must have the same
_TEMPERATURE = 200.0  # of the paper's experiments


@register("grasp", title="preserved flow of the gradient", paper="arXiv:2002.07376")
class GraSP(SensitivityPruning):
    """Prune the weights with the smallest ``w ⊙ Hg``, those whose removal helps the gradient most.

    `GraSP (Wang, Zhang and Grosse, 2020) <https://arxiv.org/abs/2002.07376>`_: removing a weight,
    ``δ = −w``, changes the squared norm of the gradient ``g`` by ``2 δᵀHg`` to first order. The
    paper's score is ``S(−w) = −w ⊙ Hg``, of which the *largest* are removed; here scores have the
    other sign, and the smallest go, as with all methods. ``H`` is the Hessian of the mean loss.
    Where weights are pruned already, ``g`` is that of the remaining ones.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        calibration: Data, model and loss; every sample counts, whatever the mini-batch.
        temperature: Logits are divided by it, so that a confident network has gradients too.
            ``"auto"`` is the paper's 200, or 1 where the model computes its own loss.
        steps: One, as in the paper, or more, with ``ρ^{t/T}`` kept after step ``t``.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.
        min_keep_per_tensor: Remaining entries that each tensor keeps as far as the count allows.
        batch_norm: ``"running"``, or ``"batch"``, as in the published code: what batch norms
            normalise by while scoring; see :class:`~torchprune_bayes.methods.SNIPit`.

    Raises:
        ArgumentError: If a temperature is given for a model that computes its own loss, or an
            option has an impossible value.
        ArgumentTypeError: If there is no calibration.

    Cost per step: two gradients of all samples and a Hessian-vector product, about five times a
    gradient in all; activations of 64 samples (of a batch of up to 512 with
    ``batch_norm="batch"``), with the graph of their gradient.

    Example:
        >>> import torch
        >>> from torchprune_bayes import Calibration, prune_global
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[2.0, -1.0]]))
        >>> data = [(torch.tensor([[1.0, 1.0]]), torch.zeros(1, 1))]
        >>> calibration = Calibration(layer, data, torch.nn.functional.mse_loss)
        >>> decision = prune_global(
        ...     None, GraSP, amount=1, calibration=calibration, temperature=1.0
        ... )
        >>> decision.scores["weight"]  # g = [2, 2], Hg = [8, 8]
        tensor([[16., -8.]])
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        calibration: Calibration | None = None,
        temperature: float | str = "auto",
        steps: int = 1,
        scope: str = "global",
        min_keep_per_tensor: int = 0,
        batch_norm: str = "running",
    ) -> None:
        super().__init__(
            amount,
            calibration=calibration,
            scope=scope,
            steps=steps,
            min_keep_per_tensor=min_keep_per_tensor,
            batch_norm=batch_norm,
        )
        if temperature != "auto":
            check_positive("temperature", temperature)
        self.temperature = temperature

    def score(self, step: int, weights: Mapping[str, Tensor], masks: Masks) -> Scores:
        """``w ⊙ Hg`` of the remaining weights."""
        calibration = _tempered(self.required_calibration.redrawn(step), self.temperature)
        left = masked(weights, masks)
        size = _BATCH if self.batch_norm == "running" else _LARGEST_BATCH
        product = _hessian_gradient_product(calibration, left, masks, size)
        return {name: weight * product[name].to(weight.device) for name, weight in left.items()}


def _tempered(calibration: Calibration, temperature: float | str) -> Calibration:
    loss_fn = calibration.loss_fn
    if temperature == "auto":
        temperature = 1.0 if loss_fn is None else _TEMPERATURE
    divisor = float(temperature)
    if divisor == 1.0:
        return calibration
    if loss_fn is None:
        raise ArgumentError(
            f"Expected a `loss_fn` of the logits for temperature={temperature}, got a model that "
            "computes its own loss: pass temperature=1.0 or a calibration with a loss_fn."
        )

    def tempered(output: Any, target: Any) -> Tensor:
        return loss_fn(getattr(output, "logits", output) / divisor, target)

    return calibration.with_loss(tempered)


def _hessian_gradient_product(
    calibration: Calibration, weights: Mapping[str, Tensor], masks: Masks, size: int
) -> dict[str, Tensor]:
    """``H(m⊙g)`` of the mean loss over all samples, by name, ``size`` samples at a time."""
    direction = {
        name: (gradient * masks[name].to(gradient.device)).to(calibration.device)
        for name, gradient in calibration.mean_gradient(weights).items()
    }
    leaves = leaves_of(calibration, weights)
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    # Fused attention kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in calibration.batches(size):
            share = batch_size(batch) / calibration.num_samples
            loss = share * calibration.loss(leaves, batch)
            for name, product in _directional_derivative(loss, leaves, direction).items():
                total[name] += product
    return total


def _directional_derivative(
    loss: Tensor, leaves: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradient of ``gᵀv`` for a fixed ``v``, which is ``Hv``."""
    inputs = list(leaves.values())
    gradient = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    slope = sum((g * direction[name]).sum() for name, g in zip(leaves, gradient, strict=True))
    if not (isinstance(slope, Tensor) and slope.requires_grad):  # the loss is linear in all weights
        return {}
    gradients = torch.autograd.grad(slope, inputs, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))
