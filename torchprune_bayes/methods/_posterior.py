"""What methods share that take a Laplace posterior of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.params import ParameterSpace, prunable_parameters, without_repeats
from torchprune_bayes.types import ParameterPairs

_TOLERANCE = 1e-3  # of the largest weight: a posterior in half precision still fits


class PosteriorPruning(PruningMethod):
    """Base class of the methods that work with a calibration, or with a posterior and its model.

    Args:
        amount: Fraction or number of the live entries to prune.
        calibration: Data, model and loss.
        posterior: A posterior at the model's weights, fitted already.
        model: The model of ``posterior``, in the place of a calibration.
        scope: ``"global"`` or ``"layer"``.

    Raises:
        AlignmentError: If the posterior is of none of the model's tensors.
        ArgumentTypeError: If there is a model without a posterior.
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        calibration: Calibration | None,
        posterior: Posterior | None,
        model: nn.Module | None,
        scope: str,
    ) -> None:
        super().__init__(amount, calibration=calibration, scope=scope)
        if model is not None and posterior is None:
            raise ArgumentTypeError("Expected `posterior=` with `model=`, got none.")
        self.posterior = posterior
        self._own_space: ParameterSpace | None = None
        if model is not None and posterior is not None:
            self._own_space = space_of_posterior(model, posterior)

    @property
    def space(self) -> ParameterSpace:
        """The calibration's parameters, or the model's that are in the posterior."""
        return super().space if self._own_space is None else self._own_space

    def space_for(self, params: ParameterPairs | None) -> ParameterSpace:
        """The tensors to decide on: with a posterior alone any of those that it is of.

        Raises:
            AlignmentError: If tensors are not in the posterior, or not the calibration's.
            ArgumentTypeError: If there are neither pairs, a model, nor a calibration.
        """
        if params is None or self.posterior is None or self.calibration is not None:
            return super().space_for(params)
        if self._own_space is None:  # the pairs may know the model
            return _in_posterior(ParameterSpace.of_pairs(params), self.posterior)
        chosen = ParameterSpace(self._own_space.model, without_repeats(params))
        return _in_posterior(chosen, self.posterior)

    def release(self) -> None:
        """Let go of model, data and posterior."""
        super().release()
        self.posterior = self._own_space = None

    def _space_of(self, module: nn.Module, name: str) -> ParameterSpace:
        if self._own_space is None:
            return super()._space_of(module, name)
        self._own_space = self._own_space.restricted(module, name)
        return self._own_space


def space_of_posterior(model: nn.Module, posterior: Posterior) -> ParameterSpace:
    """The prunable parameters of a model that are in a posterior.

    Raises:
        AlignmentError: If there are none.
    """
    space = ParameterSpace(model, prunable_parameters(model))
    found = [name for name in space.names if name in posterior.mean]
    if not found:
        raise AlignmentError(
            "Expected a posterior of weights of the model, got one of "
            f"{', '.join(posterior.names[:3])}."
        )
    return space.subset(found)


def _in_posterior(space: ParameterSpace, posterior: Posterior) -> ParameterSpace:
    missing = [name for name in space.names if name not in posterior.mean]
    if missing:
        raise AlignmentError(
            f"Expected tensors of the posterior ({', '.join(posterior.names[:3])}, ...), got "
            f"`{missing[0]}`: fit the posterior to it as well, or pass `model=` if the pairs do "
            "not know the model."
        )
    return space


def check_fitted_to(posterior: Posterior, space: ParameterSpace) -> None:
    """Refuse a posterior of other tensors or at other weights.

    Raises:
        AlignmentError: In these cases.
    """
    for tensor in space:
        mean = posterior.mean.get(tensor.name)
        if mean is None or mean.shape != tensor.leaf.shape:
            raise AlignmentError(f"Expected a posterior of `{tensor.name}` as well, got none.")
        moved = (mean.to(tensor.leaf.device) - tensor.value)[tensor.mask].abs()
        largest = float(tensor.leaf.detach().abs().max())
        if moved.numel() and float(moved.max()) > _TOLERANCE * largest:
            raise AlignmentError(
                f"Expected a posterior at the weights of `{tensor.name}`, got one at others: fit "
                "it again."
            )
