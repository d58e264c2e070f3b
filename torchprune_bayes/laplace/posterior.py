"""The Gaussian posterior of a Laplace approximation: mean, curvature and prior."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice, check_positive
from torchprune_bayes._numerics.kronecker_posterior import KroneckerBlock
from torchprune_bayes._numerics.laplace_blocks import (
    DiagonalBlock,
    LaplaceBlock,
)
from torchprune_bayes._numerics.marginal_likelihood import (
    EvidenceTerm,
    gaussian_log_likelihood,
    log_marginal_likelihood,
)
from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes.errors import AlignmentError
from torchprune_bayes.laplace.evidence import maximise_evidence
from torchprune_bayes.laplace.priors import PriorPrecision, PriorStructure
from torchprune_bayes.types import Scores

MODES = ("opd", "posterior", "obd")


class Posterior:
    """``N(θ, P⁻¹)`` with ``P = sH + D``, a curvature for each tensor and a prior precision.

    Args:
        mean: Weights ``θ`` by qualified name.
        curvature: For each of these tensors the Hessian or Fisher of the loss, summed over the
            data: its diagonal, shaped like the tensor, or a pair of Kronecker factors, the first
            over the first dimension of the tensor and the second over all others, whose product
            is that sum. A vector has ``[n, n]`` and ``[1, 1]``.
        prior: Prior precisions; default one for all layers.
        loss: Negative log-likelihood ``L``, summed over the data; for regression half the sum of
            squared errors.
        temperature: ``T``; below one the data count more than once.
        noise: Standard deviation ``σ`` of the observations; regression only.
        observations: Number of observed values, samples times outputs; regression only.
        prior_mean: Mean of the prior, a number or tensors by name.

    Everything is moved to the device of the means, or to the CPU if they are on several devices or
    on one without float64.

    Raises:
        AlignmentError: If tensors, curvature and prior do not fit each other.
        ArgumentError: If an option has an impossible value.

    Example:
        >>> posterior = Posterior({"weight": torch.ones(1, 2)}, {"weight": torch.ones(1, 2) * 3})
        >>> posterior.precision("weight"), posterior.variance("weight")
        (tensor([[4., 4.]], dtype=torch.float64), tensor([[0.2500, 0.2500]], dtype=torch.float64))
        >>> round(posterior.log_marginal_likelihood(), 4)  # −½ (2 log 4 + 2)
        -2.3863
        >>> posterior.with_best_prior("layerwise").prior.values("weight")  # δ(3 + δ) = 3
        tensor([[0.7913, 0.7913]], dtype=torch.float64)
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        curvature: Mapping[str, Tensor | tuple[Tensor, Tensor]],
        prior: PriorPrecision | None = None,
        *,
        loss: float = 0.0,
        temperature: float = 1.0,
        noise: float | None = None,
        observations: int = 0,
        prior_mean: float | Mapping[str, Tensor] = 0.0,
    ) -> None:
        check_same_names(mean, curvature)
        place = _place(mean)
        blocks = {
            name: _block(name, mean[name], _moved(value, place))
            for name, value in curvature.items()
        }
        self._set(mean, prior, loss, temperature, noise, observations, prior_mean)
        self._blocks: dict[str, LaplaceBlock] = blocks

    def _set(
        self,
        mean: Mapping[str, Tensor],
        prior: PriorPrecision | None,
        loss: float,
        temperature: float,
        noise: float | None,
        observations: int,
        prior_mean: float | Mapping[str, Tensor],
    ) -> None:
        check_positive("temperature", temperature)
        if noise is not None:
            check_positive("noise", noise)
        device = _place(mean)
        self.mean = {name: value.detach().to(device, copy=True) for name, value in mean.items()}
        shapes = {name: tuple(value.shape) for name, value in self.mean.items()}
        prior = PriorPrecision.constant(shapes, device=device) if prior is None else prior
        self.prior = prior.to(device)
        if self.prior.shapes != shapes:
            raise AlignmentError(
                "Expected a prior of the posterior's tensors, got one of other tensors."
            )
        self.loss, self.temperature = float(loss), float(temperature)
        self.noise, self.observations = noise, observations
        self.labels_per_sample: float | None = None
        self._prior_mean = prior_mean

    @property
    def names(self) -> list[str]:
        """Qualified names of the tensors."""
        return list(self.mean)

    @property
    def scale(self) -> float:
        """``s = 1/(Tσ²)``, with which curvature and loss enter the posterior."""
        return 1.0 / (self.temperature * (self.noise or 1.0) ** 2)

    @property
    def log_likelihood(self) -> float:
        """``−L/T``; for regression with noise and normaliser."""
        if self.noise is None:
            return -self.loss / self.temperature
        return gaussian_log_likelihood(
            2.0 * self.loss, self.observations, self.noise, self.temperature
        )

    @property
    def is_exact(self) -> bool:
        """Whether :meth:`log_marginal_likelihood` is exact for this curvature, or a lower bound."""
        return all(block.is_exact(self.prior.matrix(n)) for n, block in self._blocks.items())

    def precision(self, name: str, *, smoothed: bool = False) -> Tensor:
        """Diagonal of ``P`` for one tensor, ``s H_ii + δ_i``, float64 and shaped like it.

        Args:
            name: Qualified name.
            smoothed: Whether Kronecker factors average a prior that is not separable over
                rows and columns, twice, as the paper's code does.

        Cost: elementwise; with ``smoothed`` an eigendecomposition of each Kronecker factor.
        """
        block, prior = self._blocks[name], self.prior.matrix(name)
        precisions = block.smoothed_precisions if smoothed else block.precisions
        return precisions(prior, self.scale).reshape(self.mean[name].shape)

    def curvature(self, name: str) -> Tensor:
        """Diagonal of ``sH`` for one tensor, float64 and shaped like it."""
        return self.scale * self._blocks[name].diagonal().reshape(self.mean[name].shape)

    def variance(self, name: str) -> Tensor:
        """Marginal variances of one tensor, the diagonal of ``P⁻¹``, float64 and shaped like it.

        Exact, but for Kronecker factors with a prior that is not separable: then it is the variance
        under the precision whose determinant is in the lower bound.
        """
        variances = self._blocks[name].variances(self.prior.matrix(name), self.scale)
        return variances.reshape(self.mean[name].shape)

    def log_marginal_likelihood(self) -> float:
        """``log Z``; a lower bound for Kronecker factors with a parameterwise prior.

        `Immer et al. (2021) <https://arxiv.org/abs/2104.04975>`_, eq. 6.
        """
        pairs = [(term, self.prior.matrix(name)) for name, term in self._terms().items()]
        return log_marginal_likelihood(self.log_likelihood, pairs, self.scale)

    def effective_parameters(self) -> float:
        """``Σγ``, how many parameters the data determine."""
        return sum(
            float(block.effective_parameters(self.prior.matrix(name), self.scale).sum())
            for name, block in self._blocks.items()
        )

    def scores(self, mode: str = "opd", *, smoothed: bool = False) -> Scores:
        """Importance scores of all tensors, float64.

        Args:
            mode: ``"opd"``, the posterior damage ``P_ii θ_i²``, twice the fall of the log
                posterior when weight ``i`` alone is set to zero; ``"obd"``, ``s H_ii θ_i²``, that
                of the log-likelihood; ``"posterior"``, ``P_ii``.
            smoothed: See :meth:`precision`.

        Raises:
            ArgumentError: If the mode is unknown.
        """
        check_choice("mode", mode, MODES)
        scores = {}
        for name, mean in self.mean.items():
            values = (
                self.curvature(name) if mode == "obd" else self.precision(name, smoothed=smoothed)
            )
            # Weights that are held fixed have infinite precision, and 0 · ∞ is not a score.
            squares = mean.double().square()
            damage = torch.where(squares > 0, values * squares, 0.0)
            scores[name] = values if mode == "posterior" else damage
        return scores

    def with_prior(self, prior: PriorPrecision) -> Posterior:
        """The same curvature and weights under another prior.

        Raises:
            AlignmentError: If it is a prior of other tensors.
        """
        if prior.shapes != self.prior.shapes:
            raise AlignmentError(
                "Expected a prior of the posterior's tensors, got one of other tensors."
            )
        other = copy.copy(self)
        other.prior = prior
        return other

    def with_noise(self, noise: float) -> Posterior:
        """The same posterior of a regression with another observation noise."""
        check_positive("noise", noise)
        other = copy.copy(self)
        other.noise = noise
        return other

    def with_best_prior(
        self, structure: str | PriorStructure | None = None, **options: Any
    ) -> Posterior:
        """The same curvature and weights under the prior of highest evidence.

        Args:
            structure: ``"scalar"``, ``"layerwise"``, ``"unitwise"`` or ``"diag"``; default that
                of the prior.
            options: See :func:`~torchprune_bayes.laplace.maximise_evidence`.
        """
        prior = self.prior
        if structure is not None and PriorStructure.of(structure) is not prior.structure:
            device = next(iter(self.mean.values())).device
            prior = PriorPrecision.constant(prior.shapes, structure, device=device)
        best = maximise_evidence(prior, self._terms(), self.scale, **options)
        return self.with_prior(best)

    def _terms(self) -> dict[str, EvidenceTerm]:
        return {
            name: EvidenceTerm(block, self._centred(name).reshape(block.shape))
            for name, block in self._blocks.items()
        }

    def _centred(self, name: str) -> Tensor:
        center = self._prior_mean
        if isinstance(center, Mapping):
            return self.mean[name].double() - center[name].to(self.mean[name].device)
        return self.mean[name].double() - center if center else self.mean[name]


def _place(mean: Mapping[str, Tensor]) -> torch.device:
    """Device of a posterior: that of the means, if it is a single one with float64."""
    devices = {value.device for value in mean.values()}
    return float64_device(devices.pop()) if len(devices) == 1 else torch.device("cpu")


def _moved(
    curvature: Tensor | tuple[Tensor, Tensor], device: torch.device
) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(curvature, Tensor):
        return curvature.to(device)
    return curvature[0].to(device), curvature[1].to(device)


def _block(name: str, mean: Tensor, curvature: Tensor | tuple[Tensor, Tensor]) -> LaplaceBlock:
    rows = mean.shape[0] if mean.ndim else 1
    if isinstance(curvature, Tensor):
        if curvature.shape != mean.shape:
            raise AlignmentError(
                f"Expected a curvature of shape {tuple(mean.shape)} for `{name}`, got "
                f"{tuple(curvature.shape)}."
            )
        return DiagonalBlock(curvature.detach().reshape(rows, -1))
    sizes = tuple(len(factor) for factor in curvature)
    if sizes != (rows, mean.numel() // max(rows, 1)):
        raise AlignmentError(
            f"Expected Kronecker factors that fit `{name}` of shape {tuple(mean.shape)}, got "
            f"factors of {sizes[0]} and {sizes[1]} rows."
        )
    return KroneckerBlock(curvature[0].detach(), curvature[1].detach())


def check_same_names(mean: Mapping[str, Tensor], other: Mapping[str, Any]) -> None:
    """Refuse curvatures of other tensors."""
    if not mean or set(mean) != set(other):
        raise AlignmentError(
            f"Expected a curvature for each of {', '.join(mean) or 'at least one tensor'}, got one "
            f"for {', '.join(other) or 'none'}."
        )
