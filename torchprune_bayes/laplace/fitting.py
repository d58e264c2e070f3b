"""Fitting the posterior of a model's weights on calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from torch import Tensor, distributed

from torchprune_bayes._checks import check_choice, check_count, check_positive
from torchprune_bayes._distributed import on_all_ranks, rank
from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import LayerCurvature
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.laplace.posterior import Posterior
from torchprune_bayes.laplace.priors import PriorPrecision
from torchprune_bayes.types import Masks

Structure = Literal["diagonal", "kronecker"]
Kind = Literal["empirical", "monte_carlo", "ggn"]
STRUCTURES = get_args(Structure)
KINDS = get_args(Kind)


@dataclass(frozen=True)
class LaplaceOptions:
    """How a posterior is fitted.

    Attributes:
        structure: ``"diagonal"``; or ``"kronecker"``, where layers without Kronecker factors have
            diagonals.
        kind: ``"empirical"`` Fisher; ``"monte_carlo"`` Fisher, which is the GGN in expectation; or
            ``"ggn"``, with one backward pass per output.
        num_data: ``N``, the number of samples the model is trained on, to which sums over the
            calibration samples are scaled; default ``Calibration.num_data``.
        temperature: ``T``; below one the data count more than once, as with augmentation.
        loss_scale: Factor that turns the loss of one sample into its negative
            log-likelihood at ``T = σ = 1``: 1 for cross-entropy, ``C/2`` for a squared error that
            is averaged over ``C`` outputs.
        outputs: ``C``, for regression.
        all_reduce: Whether curvatures are summed over the ranks of ``torch.distributed``, each of
            which has its own shard of the data (with accelerate ``calibrate(...).local``); needs
            ``num_data``, of all. An error in one rank is raised in all.

    Raises:
        ArgumentError: If an option has an impossible value.
    """

    structure: Structure = "diagonal"
    kind: Kind = "monte_carlo"
    num_data: int | None = None
    temperature: float = 1.0
    loss_scale: float = 1.0
    outputs: int = 1
    all_reduce: bool = False

    def __post_init__(self) -> None:
        check_choice("structure", self.structure, STRUCTURES)
        check_choice("kind", self.kind, KINDS)
        check_positive("temperature", self.temperature)
        check_positive("loss_scale", self.loss_scale)
        check_count("outputs", self.outputs)
        if self.num_data is not None:
            check_count("num_data", self.num_data)
        elif self.all_reduce:
            raise ArgumentError("Expected `num_data` of all ranks with `all_reduce`, got none.")
        if self.all_reduce and not (distributed.is_available() and distributed.is_initialized()):
            raise ArgumentError(
                "Expected a process group of torch.distributed with `all_reduce`, got none."
            )

    def check_noise(self, noise: float | None) -> None:
        """Refuse an invalid noise, and the empirical Fisher with any noise.

        Raises:
            ArgumentError: In these cases.
        """
        if noise is None:
            return
        check_positive("noise", noise)
        if self.kind == "empirical":
            raise ArgumentError(
                "Expected kind='ggn' or 'monte_carlo' with `noise`, got 'empirical': products of "
                "residuals are not the Hessian of a squared error."
            )


def fit_posterior(
    calibration: Calibration,
    prior: PriorPrecision | None = None,
    *,
    noise: float | None = None,
    masks: Masks | None = None,
    **options: Any,
) -> Posterior:
    """Laplace approximation of the posterior at the model's weights.

    Args:
        calibration: Data, model and loss; the tensors are the calibration's.
        prior: Prior precisions of these; default one for all layers.
        noise: ``σ`` of the observations, for regression.
        masks: Remaining entries; default those of the model. The others have weight and curvature
            zero, but Kronecker factors do not depend on them.
        options: See :class:`LaplaceOptions`.

    Raises:
        ArgumentError: If an option has an impossible value, or the empirical Fisher is used
            for regression, where it does not have the scale of the Hessian.
        CalibrationError: If the data gave no usable gradients.

    Cost: that of the curvature, one or a few passes over the calibration samples.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> posterior = fit_posterior(calibration, kind="ggn").with_best_prior("unitwise")
        >>> posterior.precision("0.weight").shape
        torch.Size([3, 4])
    """
    chosen = LaplaceOptions(**options)
    chosen.check_noise(noise)
    space = calibration.space.at(float64_device(calibration.device))
    masks = space.masks() if masks is None else masks
    means = {name: value * masks[name].to(value.device) for name, value in space.values().items()}
    curvature = LayerCurvature(
        kind=chosen.kind,
        structure=chosen.structure,
        stream=rank() if chosen.all_reduce else 0,
    )
    if chosen.all_reduce:
        on_all_ranks(lambda: curvature.fit(calibration, means, masks))
        curvature.all_reduce()
    else:
        curvature.fit(calibration, means, masks)
    chosen = replace(chosen, num_data=chosen.num_data or calibration.num_data)
    return posterior_of(curvature, means, chosen, prior, noise=noise)


def posterior_of(
    curvature: LayerCurvature,
    means: Mapping[str, Tensor],
    options: LaplaceOptions | None = None,
    prior: PriorPrecision | None = None,
    *,
    noise: float | None = None,
) -> Posterior:
    """The posterior of a fitted, possibly saved, curvature; no data are needed.

    Args:
        curvature: Fitted at ``means``.
        means: Weights by qualified name, zero where pruned.
        options: How sums are scaled; structure and kind are the curvature's own.
        prior: Prior precisions; default one for all layers.
        noise: ``σ`` of the observations, for regression.

    Raises:
        ArgumentError: If there is a noise with the empirical Fisher.
    """
    options = replace(options or LaplaceOptions(), kind=cast(Kind, curvature.kind))
    options.check_noise(noise)
    samples = options.num_data or curvature.count
    # Squared gradients grow with the square of the loss, a Hessian with the loss itself.
    power = 2 if options.kind == "empirical" else 1
    posterior = Posterior(
        means,
        _summed(curvature, means, samples * options.loss_scale**power),
        prior,
        loss=options.loss_scale * curvature.loss_sum * samples / curvature.count,
        temperature=options.temperature,
        noise=noise,
        observations=0 if noise is None else samples * options.outputs,
    )
    posterior.labels_per_sample = curvature.num_terms / curvature.count
    return posterior


def _summed(
    curvature: LayerCurvature, means: Mapping[str, Tensor], samples: float
) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    with_factors = set(curvature.kronecker_names)
    sums: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for name, mean in means.items():
        if name in with_factors:
            rows, columns = (factor.to(mean.device) for factor in curvature.factors(name))
            sums[name] = (samples * rows, columns)
        else:
            sums[name] = samples * curvature.block_diagonal(name).to(mean.device)
    return sums
