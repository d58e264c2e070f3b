"""Reading posteriors fitted with laplace-torch, without importing that package."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.prior_updates import canonical_shape
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.laplace.joint_posterior import JointPosterior
from torchprune_bayes.laplace.posterior import Posterior
from torchprune_bayes.laplace.priors import PriorPrecision, PriorStructure
from torchprune_bayes.params import mask_of


def posterior_from_laplace(laplace: Any) -> Posterior:
    """The posterior of a fitted ``laplace.Laplace``, if it is one over weights.

    Supported are all Hessian structures (full, kron, diag, lowrank) over all weights, those of the
    last layer, or a subnetwork. Entries that a subnetwork leaves out are held fixed: they have
    infinite precision, and are pruned last.

    Args:
        laplace: A fitted posterior of laplace-torch; it is read, no reference is kept.

    Raises:
        ArgumentError: If it is not fitted.
        ArgumentTypeError: If it is not a Laplace posterior over weights.

    Cost: for full an eigendecomposition of the Hessian, else one copy.
    """
    _check_parametric(laplace)
    shapes = _shapes(laplace)
    mean = _split(laplace.mean.detach(), shapes)
    likelihood = _likelihood(laplace)
    center = torch.as_tensor(laplace.prior_mean).detach()
    subset = _subset(laplace, shapes)
    if subset is not None:
        positions, entries = subset
        prior, centers = _spread_prior(laplace, positions, shapes, center)
        parts = _joint(laplace, positions)
        return JointPosterior(mean, *parts, entries, prior, prior_mean=centers, **likelihood)
    likelihood["prior_mean"] = _split(center, shapes) if center.numel() > 1 else float(center)
    prior = _prior(laplace.prior_precision.detach(), shapes)
    if _is_joint(laplace):
        return JointPosterior(mean, *_joint(laplace), None, prior, **likelihood)
    return Posterior(mean, _per_tensor(laplace, shapes), prior, **likelihood)


def _check_parametric(laplace: Any) -> None:
    required = ("mean", "prior_precision", "sigma_noise", "temperature", "likelihood", "H")
    missing = [name for name in required if not hasattr(laplace, name)]
    if missing:
        raise ArgumentTypeError(
            "Expected a Laplace posterior over weights (full, kron, diag or lowrank), got "
            f"{type(laplace).__name__} without `{missing[0]}`."
        )
    if getattr(laplace, "H", None) is None or not hasattr(laplace, "n_data"):
        raise ArgumentError(
            "Expected a fitted Laplace posterior, got one before `fit`: call its `fit(loader)` "
            "first."
        )


def _likelihood(laplace: Any) -> dict[str, Any]:
    regression = str(getattr(laplace.likelihood, "value", laplace.likelihood)) == "regression"
    return {
        "loss": float(laplace.loss),
        "temperature": float(laplace.temperature),
        "noise": float(laplace.sigma_noise) if regression else None,
        "observations": laplace.n_data * laplace.n_outputs if regression else 0,
    }


def _shapes(laplace: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by qualified name in the user's model, in the order of the mean."""
    model, prefix = laplace.model, ""
    if hasattr(model, "last_layer"):  # the last layer alone, of a copy of the user's model
        names = {module: name for name, module in model.model.named_modules()}
        prefix = names[model.last_layer]
        named = list(model.last_layer.named_parameters())
        holder = model.last_layer
    else:
        holder = model
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if sum(p.numel() for _, p in named) != laplace.mean.numel():
            named = list(model.named_parameters())  # the low-rank form takes frozen ones as well
    return {
        f"{prefix}.{plain}" if prefix else plain: tuple(parameter.shape)
        for plain, parameter in ((_plain(holder, name), p) for name, p in named)
    }


def _plain(model: nn.Module, name: str) -> str:
    """The name of a tensor without the suffix of pruning."""
    path, _, last = name.rpartition(".")
    original = last.removesuffix("_orig")
    pruned = last.endswith("_orig") and mask_of(model.get_submodule(path), original) is not None
    return f"{path}.{original}".removeprefix(".") if pruned else name


def _split(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    parts = vector.split([prod(shape) for shape in shapes.values()])
    return {n: part.reshape(shapes[n]) for n, part in zip(shapes, parts, strict=True)}


def _prior(precision: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> PriorPrecision:
    """The prior in its own structure: scalar, layerwise or diag."""
    total = sum(prod(shape) for shape in shapes.values())
    flat = precision.reshape(-1)
    structure = {1: PriorStructure.SCALAR, total: PriorStructure.DIAG, len(shapes): None}
    kind = structure[len(flat)] or PriorStructure.LAYERWISE
    blank = PriorPrecision.constant(shapes, kind, device=flat.device)
    if kind is PriorStructure.SCALAR:
        values = dict.fromkeys(shapes, flat.reshape(1, 1, 1))
    elif kind is PriorStructure.LAYERWISE:
        values = {n: one.reshape(1, 1, 1) for n, one in zip(shapes, flat, strict=True)}
    else:
        parts = _split(flat, shapes)
        values = {n: part.reshape(canonical_shape(shapes[n])) for n, part in parts.items()}
    return _exactly(blank, values)


def _exactly(blank: PriorPrecision, values: Mapping[str, Tensor]) -> PriorPrecision:
    # In float64 and without the bounds of updates: the prior is used as fitted there.
    factors: dict[str, tuple[Tensor, ...]] = {n: (v.double(),) for n, v in values.items()}
    return PriorPrecision(blank.structure, blank.shapes, factors)


def _per_tensor(
    laplace: Any, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    if isinstance(laplace.H, Tensor):
        return dict(_split(laplace.H.detach(), shapes))
    curvature: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for name, factors in zip(shapes, laplace.H_facs.kfacs, strict=True):
        dense = [f.detach() if f.ndim > 1 else torch.diag(f.detach()) for f in factors]
        rows = dense[0]
        curvature[name] = (rows, dense[1] if len(dense) > 1 else rows.new_ones(1, 1))
    return curvature


def _is_joint(laplace: Any) -> bool:
    return isinstance(laplace.H, tuple) or (isinstance(laplace.H, Tensor) and laplace.H.ndim > 1)


def _joint(laplace: Any, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of the Hessian over the entries, in ascending order of these."""
    if isinstance(laplace.H, tuple):
        vectors, values = (part.detach().double() for part in laplace.H)
    else:
        hessian = laplace.H.detach().double()
        hessian = torch.diag(hessian) if hessian.ndim == 1 else hessian
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    if positions is not None:
        vectors = vectors[positions.argsort()]
    return vectors, values.clamp_min(0)


def _subset(
    laplace: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Positions of a subnetwork's entries in the vector of all, and in their tensors."""
    if not hasattr(laplace, "n_params_subnet"):
        return None
    positions = laplace.backend.subnetwork_indices
    ordered, entries, start = positions.sort().values, {}, 0
    for name, shape in shapes.items():
        stop = start + prod(shape)
        entries[name] = ordered[(ordered >= start) & (ordered < stop)] - start
        start = stop
    return positions, entries


def _spread_prior(
    laplace: Any, positions: Tensor, shapes: Mapping[str, tuple[int, ...]], center: Tensor
) -> tuple[PriorPrecision, float | dict[str, Tensor]]:
    """Prior of all entries from that of a subnetwork's; the others' is not used."""
    total = sum(prod(shape) for shape in shapes.values())

    def spread(values: Tensor) -> Tensor:
        full = torch.ones(total, dtype=torch.float64, device=values.device)
        return full.index_copy(0, positions, values.double())

    precision = laplace.prior_precision.detach()
    prior = _prior(spread(precision) if precision.numel() > 1 else precision, shapes)
    if center.numel() == 1:
        return prior, float(center)
    return prior, _split(center if center.numel() == total else spread(center), shapes)
