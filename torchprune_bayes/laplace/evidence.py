"""Prior precisions that maximise the marginal likelihood, in each prior structure."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice, check_count, check_positive
from torchprune_bayes._numerics.laplace_blocks import DiagonalBlock
from torchprune_bayes._numerics.marginal_likelihood import EvidenceTerm
from torchprune_bayes._numerics.prior_updates import (
    LARGEST,
    SMALLEST,
    best_constant,
    best_entries,
    canonical_shape,
    improve_factors,
    matrix_precision,
    reduced_like,
)
from torchprune_bayes.laplace.priors import PriorPrecision, PriorStructure

SOLVERS = ("fixed_point", "adam")


def maximise_evidence(
    prior: PriorPrecision,
    terms: Mapping[str, EvidenceTerm],
    scale: float = 1.0,
    *,
    solver: str = "fixed_point",
    steps: int | None = None,
    lr: float = 0.1,
    tolerance: float = 1e-4,
) -> PriorPrecision:
    """Increase the evidence by new prior precisions at fixed weights and curvature.

    The log marginal likelihood is concave in the log precisions, so a stationary point is a
    maximum. With ``solver="fixed_point"`` the evidence never decreases:

    * scalar, layerwise: MacKay's equation ``δ = γ/Σθ²``, solved by Newton's method.
    * diag with a diagonal curvature: closed form.
    * unitwise, and diag with Kronecker factors: square-rooted MacKay steps, on the units of one
      side after the other. With Kronecker factors the diag structure has a lower bound only, and
      it is the bound that increases.

    ``solver="adam"`` takes the steps of `SpaM (Dhahri et al., 2024)
    <https://arxiv.org/abs/2402.15978>`_, Adam on the log precisions; the evidence may decrease.

    Args:
        prior: Where to start, and in which structure.
        terms: Curvature and weights of each tensor of the prior.
        scale: ``s = 1/(Tσ²)``.
        solver: ``"fixed_point"`` or ``"adam"``.
        steps: Steps at most; default 50 rounds, or 100 of Adam's steps.
        lr: Adam's learning rate.
        tolerance: Change of a log precision at which to stop (fixed point).

    Raises:
        ArgumentError: If an option has an impossible value.

    Example:
        >>> h, w = torch.tensor([[2.0, 9.0]]), torch.tensor([[1.0, 1.0]], dtype=torch.float64)
        >>> terms = {"weight": EvidenceTerm(DiagonalBlock(h), w)}
        >>> prior = PriorPrecision.constant({"weight": (1, 2)}, "diag")
        >>> maximise_evidence(prior, terms).values("weight")  # δ(h + δ) = h/w²
        tensor([[0.7321, 0.9083]])
    """
    check_choice("solver", solver, SOLVERS)
    check_positive("lr", lr)
    check_positive("tolerance", tolerance)
    if steps is not None:
        check_count("steps", steps)
    if solver == "adam":
        return _by_adam(prior, terms, scale, steps or 100, lr)
    if prior.structure is PriorStructure.SCALAR:
        start = float(next(iter(prior.factors.values()))[0])
        best = best_constant(list(terms.values()), scale, start)
        return prior.with_factors({name: _filled(prior, name, best) for name in prior.factors})
    rounds = 50 if steps is None else steps
    return prior.with_factors(
        {name: _best_of(prior, name, terms[name], scale, rounds, tolerance) for name in terms}
    )


def _filled(prior: PriorPrecision, name: str, value: float) -> list[Tensor]:
    return [torch.full_like(factor, value) for factor in prior.factors[name]]


def _best_of(
    prior: PriorPrecision,
    name: str,
    term: EvidenceTerm,
    scale: float,
    rounds: int,
    tolerance: float,
) -> list[Tensor]:
    start = [factor.double() for factor in prior.factors[name]]
    if prior.structure is PriorStructure.LAYERWISE:
        return _filled(prior, name, best_constant([term], scale, float(start[0])))
    shape = canonical_shape(prior.shapes[name])
    if prior.structure is PriorStructure.DIAG:
        curvature = scale * term.block.diagonal()
        without_data = not bool((curvature > 0).all())
        layer = best_constant([term], scale) if without_data else 1.0
        closed = best_entries(curvature, term.weights.double(), layer).reshape(shape)
        if isinstance(term.block, DiagonalBlock):
            return [closed]
        start = [max((closed, start[0]), key=lambda one: _occam(term, one, shape, scale))]
    return improve_factors(term, start, shape, scale, iterations=rounds, tolerance=tolerance)


def _occam(term: EvidenceTerm, factor: Tensor, shape: tuple[int, int, int], scale: float) -> float:
    return float(term.occam(matrix_precision([factor], shape), scale))


def _by_adam(
    prior: PriorPrecision,
    terms: Mapping[str, EvidenceTerm],
    scale: float,
    steps: int,
    lr: float,
) -> PriorPrecision:
    shared = prior.structure is PriorStructure.SCALAR
    names = list(prior.factors)
    logs = {name: [f.double().log() for f in prior.factors[name]] for name in names}
    if shared:
        logs = dict.fromkeys(names, logs[names[0]])
    leaves = {id(log): log for factor_logs in logs.values() for log in factor_logs}
    optimizer = torch.optim.Adam(list(leaves.values()), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        for name in names:
            _add_slopes(logs[name], terms[name], canonical_shape(prior.shapes[name]), scale)
        optimizer.step()
    factors = {name: [log.exp() for log in logs[name]] for name in names}
    return prior.with_factors(factors)


def _add_slopes(
    logs: list[Tensor], term: EvidenceTerm, shape: tuple[int, int, int], scale: float
) -> None:
    """Add ``−d log Z / d log δ`` to the gradients, in closed form."""
    factors = [log.exp().clamp(SMALLEST, LARGEST) for log in logs]
    effective, scatter = term.parts_of_slope(matrix_precision(factors, shape), scale)
    for log, factor in zip(logs, factors, strict=True):
        slope = reduced_like(scatter - effective, factor, shape) / 2
        log.grad = slope if log.grad is None else log.grad + slope
