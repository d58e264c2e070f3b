from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprune_bayes._numerics.kronecker_posterior import KroneckerBlock
from torchprune_bayes._numerics.laplace_blocks import DiagonalBlock, LaplaceBlock
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

SHAPE = (4, 3, 2)
STARTS = {
    "units": [torch.ones(4, 1, 1).double(), torch.ones(1, 3, 1).double()],
    "entries": [torch.ones(4, 3, 2).double()],
}


def _term(kind: str, seed: int = 0, size: float = 0.5) -> EvidenceTerm:
    generator = torch.Generator().manual_seed(seed)
    roots = [torch.randn(n, n + 2, generator=generator, dtype=torch.float64) for n in (4, 6)]
    block: LaplaceBlock = KroneckerBlock(*(root @ root.mT for root in roots))
    if kind == "diagonal":
        block = DiagonalBlock(block.diagonal())
    weights = size * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return EvidenceTerm(block, weights)


def _occam(term: EvidenceTerm, factors: list[Tensor], scale: float = 0.6) -> float:
    return float(term.occam(matrix_precision(factors, SHAPE), scale))


def test_golden_values_of_the_closed_form() -> None:
    h = torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64)
    w = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    # h/2 (√(1 + 4/(h w²)) − 1): √3 − 1, (√5 − 1)/2, 2(√5 − 1)
    expected = torch.tensor([3**0.5 - 1, (5**0.5 - 1) / 2, 2 * (5**0.5 - 1)], dtype=torch.float64)
    torch.testing.assert_close(best_entries(h, w, fallback=1.0), expected, rtol=1e-14, atol=0)


@given(st.floats(1e-8, 1e8), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_closed_form_is_stationary(h: float, w: float) -> None:
    curvature, weight = torch.tensor([h]).double(), torch.tensor([w]).double()
    delta = best_entries(curvature, weight, fallback=1.0)
    if SMALLEST < float(delta) < LARGEST:
        residual = curvature / (curvature + delta) / (delta * weight.square()) - 1
        assert abs(float(residual)) < 1e-8


def test_the_closed_form_at_its_limits() -> None:
    h = torch.tensor([0.0, 1.0, 1e-30, 1.0], dtype=torch.float64)
    w = torch.tensor([1.0, 0.0, 1.0, 1e-30], dtype=torch.float64)
    found = best_entries(h, w, fallback=3.0)
    assert found.tolist() == [3.0, LARGEST, SMALLEST, LARGEST]


def test_posterior_damage_ranks_as_obd_does_at_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    h = (3 * torch.randn(2000, generator=generator)).exp().double()
    w = torch.randn(2000, generator=generator).double()
    delta = best_entries(h, w, fallback=1.0)
    opd, obd = (h + delta) * w.square(), h * w.square()
    assert torch.equal(opd.argsort(), obd.argsort())


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
@pytest.mark.parametrize("start", [1e-4, 1.0, 1e6])
def test_a_shared_precision_is_stationary_from_any_start(kind: str, start: float) -> None:
    terms = [_term(kind, seed) for seed in range(3)]
    best = best_constant(terms, 0.6, start)
    factor = torch.full((1, 1, 1), best, dtype=torch.float64)
    parts = [term.parts_of_slope(matrix_precision([factor], SHAPE), 0.6) for term in terms]
    slope = sum(float((effective - scatter).sum()) for effective, scatter in parts)
    assert abs(slope) < 1e-8
    assert best == pytest.approx(best_constant(terms, 0.6, 0.1), rel=1e-10)


def test_a_shared_precision_at_its_limits() -> None:
    nothing = DiagonalBlock(torch.zeros(4, 6))
    flat, ones = torch.zeros(4, 6).double(), torch.ones(4, 6).double()
    assert best_constant([EvidenceTerm(nothing, ones)], 1.0, 2.0) == SMALLEST
    assert best_constant([EvidenceTerm(nothing, flat)], 1.0, 2.0) == 2.0
    assert best_constant([EvidenceTerm(DiagonalBlock(ones), flat)], 1.0, 2.0) == LARGEST


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
@pytest.mark.parametrize("structure", STARTS)
def test_steps_never_lower_the_evidence_and_end_at_its_maximum(kind: str, structure: str) -> None:
    term = _term(kind)
    factors = STARTS[structure]
    before = _occam(term, factors)
    for _ in range(40):
        factors = improve_factors(term, factors, SHAPE, 0.6, iterations=1)
        after = _occam(term, factors)
        assert after >= before - 1e-9
        before = after
    factors = improve_factors(term, factors, SHAPE, 0.6, iterations=1500, tolerance=1e-10)
    parts = term.parts_of_slope(matrix_precision(factors, SHAPE), 0.6)
    for factor in factors:
        slope = reduced_like(parts[0] - parts[1], factor, SHAPE) / 2
        inside = (factor > 1.01 * SMALLEST) & (factor < 0.99 * LARGEST)
        assert float(slope[inside].abs().max()) < 1e-5
    # Concave: no direction in the log precisions leads higher.
    generator = torch.Generator().manual_seed(9)
    top = _occam(term, factors)
    for _ in range(20):
        moved = [
            f * (0.3 * torch.randn(f.shape, generator=generator, dtype=torch.float64)).exp()
            for f in factors
        ]
        assert _occam(term, moved) <= top + 1e-7


def test_the_entries_of_a_diagonal_end_at_the_closed_form() -> None:
    term = _term("diagonal")
    (found,) = improve_factors(term, STARTS["entries"], SHAPE, 0.6, iterations=500, tolerance=1e-13)
    closed = best_entries(0.6 * term.block.diagonal(), term.weights, fallback=1.0)
    torch.testing.assert_close(found.reshape(4, 6), closed, rtol=1e-9, atol=0)


def test_units_have_a_fixed_scale() -> None:
    _, inputs = improve_factors(_term("kronecker"), STARTS["units"], SHAPE, 0.6, iterations=5)
    assert float(inputs.log().mean()) == pytest.approx(0.0, abs=1e-12)


def test_shapes_of_tensors() -> None:
    assert canonical_shape(()) == (1, 1, 1)
    assert canonical_shape((5,)) == (5, 1, 1)
    assert canonical_shape((5, 4)) == (5, 4, 1)
    assert canonical_shape((5, 4, 3, 2)) == (5, 4, 6)
    kernel = matrix_precision(
        [torch.ones(5, 1, 1), torch.arange(1.0, 5).reshape(1, 4, 1)], (5, 4, 6)
    )
    assert kernel.shape == (5, 24)
    assert torch.equal(kernel.dense()[2], torch.arange(1.0, 5).double().repeat_interleave(6))
