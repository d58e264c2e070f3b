"""Base of methods that use a Laplace posterior of a model's weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict

import torch
from torch import nn

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import LayerCurvature
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError
from torchprune_bayes.laplace import (
    LaplaceOptions,
    Posterior,
    PriorStructure,
    fit_posterior,
    posterior_of,
)
from torchprune_bayes.methods._curvature_holder import check_curvature_type
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.params import ParameterSpace, prunable_parameters, without_repeats
from torchprune_bayes.types import ParameterPairs

_TOLERANCE = 1e-3  # of the largest weight: a posterior in half precision still fits


class PosteriorPruning(PruningMethod):
    """Base class of the methods that work with a calibration, or with what was fitted before.

    Args:
        amount: Fraction or number of the remaining entries to prune.
        calibration: Data, model and loss; by default the curvature's.
        curvature: A curvature fitted at the model's weights, instead of a pass over the data.
        posterior: A posterior at the model's weights, fitted already.
        model: The model of ``posterior`` or ``curvature``, instead of a calibration.
        prior: Structure of the prior of highest evidence, if there is no posterior.
        fit: How the posterior is fitted, where there is none.
        scope: ``"global"`` or ``"layer"``.

    Raises:
        AlignmentError: If posterior or curvature are of none of the model's tensors.
        ArgumentTypeError: If there is a model with neither, or the curvature is none.
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        calibration: Calibration | None,
        curvature: LayerCurvature | None,
        posterior: Posterior | None,
        model: nn.Module | None,
        prior: str,
        fit: LaplaceOptions,
        scope: str,
    ) -> None:
        check_curvature_type(type(self).__name__, curvature, LayerCurvature)
        if calibration is None and curvature is not None:
            calibration = curvature.calibration
        super().__init__(amount, calibration=calibration, scope=scope)
        self.posterior, self.curvature = posterior, curvature
        self.prior, self._fit = PriorStructure.of(prior), fit
        self._own_space: ParameterSpace | None = None
        if model is not None and self._fitted_names is None:
            raise ArgumentTypeError(
                "Expected `posterior=` or `curvature=` with `model=`, got neither."
            )
        if model is not None and self._fitted_names is not None:
            self._own_space = _space_of_model(model, self._fitted_names)

    @property
    def space(self) -> ParameterSpace:
        """The calibration's parameters, or the model's that are in the posterior."""
        return super().space if self._own_space is None else self._own_space

    def space_for(self, params: ParameterPairs | None) -> ParameterSpace:
        """The tensors to decide on: without data any of those that there is a posterior of.

        Raises:
            AlignmentError: If tensors are not in the posterior, or not the calibration's.
            ArgumentTypeError: If there are neither pairs, a model, nor a calibration.
        """
        names = self._fitted_names
        if params is None or names is None or self.calibration is not None:
            return super().space_for(params)
        if self._own_space is None:  # the pairs may know the model
            return _among(ParameterSpace.of_pairs(params), names)
        return _among(ParameterSpace(self._own_space.model, without_repeats(params)), names)

    def posterior_at(self, space: ParameterSpace) -> Posterior:
        """The posterior at the weights of ``space``: the given one, or one fitted now.

        Raises:
            AlignmentError: If the given one is of other tensors or other weights.
            CalibrationError: If the data gave no usable curvature.
        """
        posterior = self.posterior
        if posterior is None:
            masks = space.masks()
            if self.curvature is not None:
                self.curvature.check_fitted_to(masks)
                fitted = posterior_of(self.curvature, space.values(), self._fit)
            else:
                fitted = fit_posterior(self.required_calibration, masks=masks, **asdict(self._fit))
            posterior = fitted.with_best_prior(self.prior)
        _check_fitted_to(posterior, space)
        return posterior

    def release(self) -> None:
        """Let go of model, data, curvature and posterior."""
        super().release()
        self.posterior = self.curvature = self._own_space = None

    @property
    def _fitted_names(self) -> Collection[str] | None:
        if self.posterior is not None:
            return self.posterior.names
        return None if self.curvature is None else list(self.curvature.masks)

    def _space_of(self, module: nn.Module, name: str) -> ParameterSpace:
        if self._own_space is None:
            if self.calibration is None and self._fitted_names is not None:
                return self.space_for([(module, name)])
            return super()._space_of(module, name)
        self._own_space = self._own_space.restricted(module, name)
        return self._own_space


def _space_of_model(model: nn.Module, names: Collection[str]) -> ParameterSpace:
    """The prunable parameters of a model that are among ``names``."""
    space = ParameterSpace(model, prunable_parameters(model))
    shared = [name for name in space.names if name in names]
    if not shared:
        raise AlignmentError(
            f"Expected a posterior of weights of the model, got one of {_shortened(names)}."
        )
    return space.subset(shared)


def _among(space: ParameterSpace, names: Collection[str]) -> ParameterSpace:
    missing = [name for name in space.names if name not in names]
    if missing:
        raise AlignmentError(
            f"Expected tensors of the posterior ({_shortened(names)}, ...), got "
            f"`{missing[0]}`: fit the posterior to it as well, or pass `model=` if the pairs do "
            "not know the model."
        )
    return space


def _shortened(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3])


def _check_fitted_to(posterior: Posterior, space: ParameterSpace) -> None:
    """Refuse a posterior of other tensors or at other weights.

    Raises:
        AlignmentError: In these cases.
    """
    moved, names = [], []
    for tensor in space:
        mean = posterior.mean.get(tensor.name)
        if mean is None or mean.shape != tensor.leaf.shape:
            raise AlignmentError(f"Expected a posterior of `{tensor.name}` as well, got none.")
        if mean.numel():
            weights = tensor.leaf.detach().to(tensor.value.device)
            change = ((mean.to(weights.device) - tensor.value) * tensor.mask).abs().max()
            moved.append(change > _TOLERANCE * weights.abs().max())
            names.append(tensor.name)
    for name, has_moved in zip(names, torch.stack(moved).tolist() if moved else [], strict=True):
        if has_moved:
            raise AlignmentError(
                f"Expected a posterior at the weights of `{name}`, got one at others: fit it again."
            )
