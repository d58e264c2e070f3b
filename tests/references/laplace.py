"""Laplace approximations written out densely in float64, from the papers' equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_curvature(curvature: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """``diag(h)`` or ``R ⊗ C`` over the row-major entries of a tensor."""
    if isinstance(curvature, Tensor):
        return torch.diag(curvature.double().flatten())
    return torch.kron(curvature[0].double().contiguous(), curvature[1].double().contiguous())


def dense_precision(
    curvature: Tensor | tuple[Tensor, Tensor], precision: Tensor, scale: float
) -> Tensor:
    """``sH + diag(δ)``."""
    return scale * dense_curvature(curvature) + torch.diag(precision.double().flatten())


def log_det_ratio(
    curvature: Tensor | tuple[Tensor, Tensor], precision: Tensor, scale: float
) -> Tensor:
    """``log det(sH + D) − log det D``."""
    dense = dense_precision(curvature, precision, scale)
    return torch.logdet(dense) - precision.double().log().sum()


def projected_log_det_ratio(
    factors: tuple[Tensor, Tensor], precision: Tensor, scale: float
) -> Tensor:
    """The bound: ``log det`` of ``sΛ`` plus the diagonal of ``QᵀDQ`` in the basis of ``H``."""
    vectors = [torch.linalg.eigh(factor.double())[1] for factor in factors]
    basis = torch.kron(vectors[0].contiguous(), vectors[1].contiguous())
    dense = basis.mT @ dense_precision(factors, precision, scale) @ basis
    return dense.diagonal().log().sum() - precision.double().log().sum()


def log_evidence(
    log_likelihood: float,
    curvature: dict[str, Tensor | tuple[Tensor, Tensor]],
    precision: dict[str, Tensor],
    weights: dict[str, Tensor],
    scale: float = 1.0,
) -> Tensor:
    """``log p(D|θ) − ½ (log det P/det D + θᵀDθ)``, differentiable in the precisions."""
    total = torch.tensor(log_likelihood, dtype=torch.float64)
    for name, block in curvature.items():
        scatter = (precision[name] * weights[name].double().square()).sum()
        total = total - (log_det_ratio(block, precision[name], scale) + scatter) / 2
    return total


def regression_log_evidence(x: Tensor, y: Tensor, precision: Tensor, noise: float) -> float:
    """Exact log evidence of ``y = x Wᵀ + ε``: each output is Gaussian with covariance known.

    Args:
        x: ``[n, in]``.
        y: ``[n, out]``.
        precision: Of the weights, ``[out, in]``.
        noise: ``σ``.
    """
    total = 0.0
    for output, own in zip(y.mT, precision, strict=True):
        covariance = noise**2 * torch.eye(len(x), dtype=x.dtype) + (x / own) @ x.mT
        quadratic = output @ torch.linalg.solve(covariance, output)
        normaliser = torch.logdet(covariance) + len(x) * math.log(2 * math.pi)
        total -= float(quadratic + normaliser) / 2
    return total


def regression_mode(x: Tensor, y: Tensor, precision: Tensor, noise: float) -> Tensor:
    """Weights ``[out, in]`` that maximise the log joint of the same regression."""
    rows = []
    for output, own in zip(y.mT, precision, strict=True):
        system = x.mT @ x / noise**2 + torch.diag(own)
        rows.append(torch.linalg.solve(system, x.mT @ output / noise**2))
    return torch.stack(rows)
