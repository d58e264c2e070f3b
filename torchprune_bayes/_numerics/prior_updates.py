"""Prior precisions that maximise the marginal likelihood at fixed weights and curvature.

Legend as in :mod:`~torchprune_bayes._numerics.marginal_likelihood`. A tensor is seen as
``[units, inputs, positions]`` here, positions being those of a convolution's kernel, and factors of
its precision are broadcast over that.

The fixed point of MacKay is ``δ = γ/θ²``, numerator and denominator summed over the entries that
share ``δ``. Iterating it may overshoot. The square root of that step never does: ``log Z`` is
bounded from below by a function of ``v = 1/δ`` that touches it at the current value, because
``log det(I + sHV)`` is concave in ``V``, and ``√(δ γ/θ²)`` is where this bound is highest
(`Wipf and Nagarajan, 2008 <https://papers.nips.cc/paper/3372-a-new-view-of-automatic-relevance-determination>`_).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchprune_bayes._numerics.laplace_blocks import Precision
from torchprune_bayes._numerics.marginal_likelihood import EvidenceTerm

SMALLEST, LARGEST = 1e-6, 1e8
"""Bounds of prior precisions: without curvature the best is 0, at a weight of 0 infinity."""

Shape3 = tuple[int, int, int]


def canonical_shape(shape: Sequence[int]) -> Shape3:
    """``(units, inputs, positions)`` of a tensor.

    Example:
        >>> canonical_shape((8, 3, 5, 5)), canonical_shape((10,)), canonical_shape(())
        ((8, 3, 25), (10, 1, 1), (1, 1, 1))
    """
    units, inputs, *positions = (*shape, *[1] * max(2 - len(shape), 0))
    return units, inputs, math.prod(positions)


def matrix_precision(factors: Sequence[Tensor], shape: Shape3) -> Precision:
    """Factors that broadcast over ``shape``, for the matrix ``[units, inputs·positions]``."""
    units, inputs, positions = shape
    flat = []
    for factor in factors:
        if factor.shape[1] > 1 or factor.shape[2] > 1:
            factor = factor.expand(-1, inputs, positions)
        flat.append(factor.double().reshape(factor.shape[0], -1))
    return Precision(tuple(flat), (units, inputs * positions))


def best_constant(terms: Sequence[EvidenceTerm], scale: float, start: float = 1.0) -> float:
    """The one precision for all entries of the terms, by Newton's method on ``log(γ/(δΣθ²))``.

    That function of ``log δ`` falls with a slope between −1 and −2, so the steps contract.

    Args:
        terms: Tensors that share the precision.
        scale: ``s``.
        start: Where to start; also the answer if the weights are all zero and without curvature.

    Cost: about ten elementwise passes over the eigenvalues.
    """
    squares = sum(float(term.squares().sum()) for term in terms)
    bounds = math.log(SMALLEST), math.log(LARGEST)
    log_precision = math.log(start)
    for _ in range(100):
        effective, curved = _effective_in_all(terms, scale, math.exp(log_precision))
        if not effective:
            return SMALLEST if squares else start
        if not squares:
            return LARGEST
        miss = math.log(effective / squares) - log_precision
        before = log_precision
        log_precision = min(max(before + miss / (1.0 + curved / effective), bounds[0]), bounds[1])
        if abs(log_precision - before) < 1e-14 * max(abs(before), 1.0):
            break
    return math.exp(log_precision)


def best_entries(curvature: Tensor, weights: Tensor, fallback: float) -> Tensor:
    """The precision of each entry where ``H`` is diagonal, in closed form.

    ``δ(h + δ) = h/θ²`` has the positive root ``δ = 2/(θ² + |θ|√(θ² + 4/h))``, with ``s`` in ``h``.
    Then ``(h + δ)θ²`` grows with ``hθ²``: with these priors, posterior damage ranks as OBD does.

    Args:
        curvature: ``s h``.
        weights: ``θ``, float64.
        fallback: Precision of entries without curvature, which leaves theirs undetermined.

    Example:
        >>> h, w = torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0]).double()
        >>> best_entries(h, w, fallback=1.0)  # δ(2 + δ) = 2
        tensor([0.7321], dtype=torch.float64)
    """
    root = weights.abs() * (weights.square() + 4.0 / curvature).sqrt()
    best = (2.0 / (weights.square() + root)).clamp(SMALLEST, LARGEST)
    return torch.where(curvature > 0, best, fallback)


def improve_factors(
    term: EvidenceTerm,
    factors: Sequence[Tensor],
    shape: Shape3,
    scale: float,
    *,
    iterations: int,
    tolerance: float = 1e-6,
) -> list[Tensor]:
    """Raise the evidence by steps on one factor after the other; it never falls.

    Args:
        term: The tensor's part of the evidence.
        factors: Factors to start from, float64, none of them constant over all entries they reach
            unless that is meant.
        shape: ``(units, inputs, positions)``.
        scale: ``s``.
        iterations: Rounds over the factors at most.
        tolerance: Largest change of a log precision in a round at which to stop.

    Returns:
        The factors; if there are two, the second has the geometric mean one.

    Cost: per round and factor one evaluation of ``γ``: elementwise for a diagonal ``H``, two
    eigendecompositions for Kronecker factors and separable precisions, else products of the size of
    ``H``'s factors.
    """
    current = list(factors)
    for _ in range(iterations):
        changes = []
        for index in range(len(current)):
            current[index], change = _improved(term, current, index, shape, scale)
            changes.append(change)
        if max(changes) < tolerance:
            break
    return _normalised(current)


def reduced_like(values: Tensor, factor: Tensor, shape: Shape3) -> Tensor:
    """Sum ``[rows, columns]`` over the entries that each entry of a factor reaches."""
    cube = values.reshape(shape)
    dims = [dim for dim in range(3) if factor.shape[dim] == 1 and shape[dim] > 1]
    return cube.sum(dims, keepdim=True) if dims else cube


def _effective_in_all(
    terms: Sequence[EvidenceTerm], scale: float, precision: float
) -> tuple[float, float]:
    """``Σγ`` and ``Σγ(1 − γ)`` for one precision over all entries."""
    total, curved = 0.0, 0.0
    for term in terms:
        scaled = scale * term.block.spectrum()
        effective = scaled / (scaled + precision)
        total += float(effective.sum())
        curved += float((effective - effective.square()).sum())
    return total, curved


def _improved(
    term: EvidenceTerm, factors: list[Tensor], index: int, shape: Shape3, scale: float
) -> tuple[Tensor, float]:
    factor = factors[index]
    precision = matrix_precision(factors, shape)
    exact = term.block.is_exact(precision)
    parts = term.parts_of_slope(precision, scale)
    effective, scatter = (reduced_like(part, factor, shape) for part in parts)
    direction = _direction(effective, scatter, shape)
    if exact:
        stepped = (factor.log() + direction).exp().clamp(SMALLEST, LARGEST)
    else:
        stepped = _backtracked(term, factors, index, direction, shape, scale)
    return stepped, float((stepped / factor).log().abs().max())


def _direction(effective: Tensor, scatter: Tensor, shape: Shape3) -> Tensor:
    """The step of the square root, in ``log δ``; where a bound's ``γ < 0``, the step of EM.

    EM's ``δ = n/(Σθ² + Σ diag P⁻¹)`` over the ``n`` entries that share ``δ`` is defined always.
    """
    tiny = torch.finfo(torch.float64).tiny
    half = 0.5 * (effective.clamp_min(tiny).log() - scatter.clamp_min(tiny).log())
    shared = math.prod(shape) / effective.numel()
    expected = math.log(shared) - (scatter + shared - effective).clamp_min(tiny).log()
    still = (effective == 0) & (scatter == 0)
    return torch.where(effective < 0, expected, half).masked_fill(still, 0.0)


def _backtracked(
    term: EvidenceTerm,
    factors: list[Tensor],
    index: int,
    direction: Tensor,
    shape: Shape3,
    scale: float,
) -> Tensor:
    # The direction has the sign of the slope in each entry, so a short enough step increases the
    # objective.
    before = float(term.occam(matrix_precision(factors, shape), scale))
    for halvings in range(12):
        stepped = (factors[index].log() + direction / 2**halvings).exp().clamp(SMALLEST, LARGEST)
        tried = [*factors[:index], stepped, *factors[index + 1 :]]
        if float(term.occam(matrix_precision(tried, shape), scale)) >= before:
            return stepped
    return factors[index]


def _normalised(factors: list[Tensor]) -> list[Tensor]:
    # (ca, b/c) is the same precision for every c, so c is free; this one keeps both in bounds.
    if len(factors) < 2:
        return factors
    first, second = factors
    mean = second.log().mean().exp()
    return [first * mean, second / mean]
