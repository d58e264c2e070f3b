"""SynFlow: pruning without data, by the flow through all paths of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from torchprune_bayes._numerics.precision import float64_device, wide
from torchprune_bayes.calibration import Batch, Calibration
from torchprune_bayes.calibration.functional import preserved
from torchprune_bayes.errors import ArgumentTypeError, CalibrationError
from torchprune_bayes.methods.registry import register
from torchprune_bayes.methods.sensitivity import masked
from torchprune_bayes.methods.stepwise import StepwisePruning
from torchprune_bayes.types import Masks, Scores


@register("synflow", title="flow through all paths, without data", paper="arXiv:2006.05467")
class SynFlow(StepwisePruning):
    """Prune the weights with the smallest ``|w| ∂R/∂|w|``, ``R`` the flow through the network.

    `SynFlow (Tanaka et al., 2020) <https://arxiv.org/abs/2006.05467>`_: ``R = 1ᵀ(∏_l |W_l|)1`` is
    the sum of the outputs for an input of ones, with all weights by their absolute value. A
    weight's score is the flow through it, so the scores of each layer of a chain sum to ``R``,
    and no layer is emptied before the others. A share ``ρ^{t/T}`` is kept after step ``t``.

    Nothing of the data counts but the shape of one sample, and no loss. Everything is computed in
    float64, whatever the model's dtype, since products over many layers leave the range of
    float32. Biases and the means of batch norms are left out, as they are in the equation (the
    published code keeps their absolute values); activations are the model's own, which for positive
    numbers are the identity in networks of ReLUs.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        calibration: The model and, for the shape of its input, data.
        steps: ``T``.
        path: ``"geometric"``, the paper's; ``"linear"`` or ``"cubic"``.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.
        min_keep_per_tensor: Remaining entries that each tensor keeps as far as the count allows.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is no calibration, or inputs are no floats (token ids have no
            input of ones).
        CalibrationError: If the flow is not finite.

    Cost: ``T`` passes of one sample forward and backward; a copy of the model in float64.

    Example:
        >>> import torch
        >>> from torchprune_bayes import Calibration, prune_global
        >>> layer = torch.nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
        >>> data = [(torch.zeros(1, 2), torch.zeros(1, 2))]
        >>> calibration = Calibration(layer, data, torch.nn.functional.mse_loss)
        >>> decision = prune_global(None, SynFlow, amount=1, calibration=calibration, steps=1)
        >>> decision.scores["weight"]
        tensor([[1.0000, 3.0000],
                [2.0000, 0.5000]], dtype=torch.float64)
    """

    def __init__(
        self, amount: float | int | Mapping[str, int], *, steps: int = 100, **options: Any
    ) -> None:
        super().__init__(amount, steps=steps, **options)

    def score(self, step: int, weights: Mapping[str, Tensor], masks: Masks) -> Scores:
        """``|w| ∂R/∂|w|`` of what is left."""
        calibration = self.required_calibration
        leaves = {
            name: wide(weight.to(calibration.device)).abs().requires_grad_()
            for name, weight in masked(weights, masks).items()
        }
        flow = _flow(calibration, leaves)
        if not flow.isfinite():
            raise CalibrationError(
                "Expected a finite flow through the network in float64, got "
                f"{float(flow.detach())}: scale the weights down."
            )
        gradients = torch.autograd.grad(flow, list(leaves.values()), materialize_grads=True)
        return {
            name: (leaf.detach() * gradient).to(weights[name].device)
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }


def _flow(calibration: Calibration, leaves: Mapping[str, Tensor]) -> Tensor:
    """``R``: the sum of the outputs for an input of ones."""
    model = calibration.model
    args, kwargs = _ones_like_inputs(next(calibration.batches(1)))
    state = _linear_state(calibration) | {
        tensor.leaf_name: leaves[tensor.name] for tensor in calibration.space
    }
    with preserved(model), torch.enable_grad():
        output = functional_call(model, state, args, kwargs)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise ArgumentTypeError(
            f"Expected a model whose output is a tensor, got {type(output).__name__}."
        )
    return output.sum()


def _linear_state(calibration: Calibration) -> dict[str, Tensor]:
    """Absolute values of all parameters and buffers in float64; no additive constants."""
    model = calibration.model
    pruned = {id(tensor.leaf) for tensor in calibration.space}
    state: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in pruned:
            continue
        moved = tensor.detach().to(float64_device(calibration.device))
        if moved.is_floating_point():
            moved = wide(moved).abs()
        state[name] = torch.zeros_like(moved) if _is_additive(name) else moved.clone()
    return state


def _is_additive(name: str) -> bool:
    return name.endswith("bias") or name.rpartition(".")[2] == "running_mean"


def _ones_like_inputs(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model for one sample of ones, shaped like a batch of one."""
    if isinstance(batch, Mapping):
        given = {key: value for key, value in batch.items() if key != "labels"}
        return (), {key: _ones(value) for key, value in given.items()}
    inputs = batch[0]
    if isinstance(inputs, Mapping):
        return (), {key: _ones(value) for key, value in inputs.items()}
    values = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    return tuple(_ones(value) for value in values), {}


def _ones(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        raise ArgumentTypeError(
            f"Expected floating-point inputs for SynFlow, whose input is all ones, got "
            f"{value.dtype}."
        )
    return torch.ones(value.shape, dtype=torch.float64, device=float64_device(value.device))
