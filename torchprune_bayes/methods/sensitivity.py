"""Sensitivity of the loss to gates on the weights, which several methods rank by.

A gate ``c`` multiplies a weight, ``c ⊙ w``. By the chain rule the loss changes by ``w ∂L/∂w`` per
unit of the gate at ``c = 1``, so that no gates are needed. Everything here is a function of given
weights; the model keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchprune_bayes._checks import check_choice
from torchprune_bayes.calibration import Calibration, batch_size
from torchprune_bayes.curvature.leaves import leaves_of
from torchprune_bayes.errors import ParameterError
from torchprune_bayes.methods.stepwise import StepwisePruning
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision, Masks, Scores

BATCH_NORMS = ("running", "batch")


class SensitivityPruning(StepwisePruning):
    """Base class of the stepwise methods that take gradients of the loss.

    Args:
        amount: Fraction or number of the remaining entries to prune.
        batch_norm: Statistics of batch norms, see :func:`normalising_by`.
        options: Arguments of :class:`StepwisePruning`.
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        batch_norm: str = "running",
        **options: Any,
    ) -> None:
        super().__init__(amount, **options)
        check_choice("batch_norm", batch_norm, BATCH_NORMS)
        self.batch_norm = batch_norm

    def decide(self, space: ParameterSpace) -> Decision:
        """Choose masks step by step; the model is not changed.

        Args:
            space: The calibration's parameters.

        Raises:
            CalibrationError: If the data gave no usable gradients.
            ParameterError: If batch norms that are synchronised cannot normalise by the batch.
        """
        with normalising_by(self.batch_norm, self.required_calibration.model):
            return super().decide(space)


@contextmanager
def normalising_by(batch_norm: str, model: nn.Module) -> Iterator[None]:
    """Let the passes of a calibration normalise by running statistics or by those of the batch.

    Passes run in evaluation mode on copies of the buffers. With ``"batch"`` every batch norm is
    put into training mode as it is called, and nothing else is, dropout for one; its statistics
    move on the copies. A batch of one sample, which has no variance, keeps the running ones.

    Args:
        batch_norm: ``"running"`` or ``"batch"``.
        model: The calibration's model.

    Raises:
        ParameterError: If a batch norm would wait for other processes.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules() if batch_norm == "batch" else ():
            if isinstance(module, nn.SyncBatchNorm):
                raise ParameterError(
                    "Expected batch norms of one process for batch_norm='batch', got SyncBatchNorm "
                    f"at `{name}`: use batch_norm='running'."
                )
            if isinstance(module, _BatchNorm):
                hook = module.register_forward_pre_hook(_train_on_several, with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _train_on_several(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    # Every pass of a calibration puts the modes back that it found.
    inputs: Tensor = args[0] if args else kwargs["input"]
    module.training = len(inputs) > 1


def masked(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """The weights with zeros where the mask is ``False``."""
    return {name: weight.masked_fill(~masks[name], 0) for name, weight in weights.items()}


def sensitivities(
    calibration: Calibration, weights: Mapping[str, Tensor], at: Mapping[str, Tensor] | None = None
) -> Scores:
    """``w ∂L/∂w`` of the mean loss over all calibration samples, with its sign.

    Args:
        calibration: Data, model and loss.
        weights: The factor ``w``, by qualified name.
        at: Where the gradient is taken, by default at ``weights``.
    """
    gradient = calibration.mean_gradient(weights if at is None else at)
    return {name: weight * gradient[name].to(weight.device) for name, weight in weights.items()}


def mean_loss(calibration: Calibration, weights: Mapping[str, Tensor]) -> float:
    """Mean loss over all calibration samples."""
    values, total = leaves_of(calibration, weights), 0.0
    with torch.no_grad():
        for batch in calibration.batches():
            total += float(calibration.loss(values, batch)) * batch_size(batch)
    return total / calibration.num_samples


def absolute(scores: Scores, unit: float = 1.0) -> Scores:
    """Absolute values, in units of ``unit``."""
    return {name: score.abs() / unit for name, score in scores.items()}
