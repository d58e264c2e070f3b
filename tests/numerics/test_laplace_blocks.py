from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.references import laplace as reference
from torchprune_bayes._numerics.kronecker_posterior import KroneckerBlock
from torchprune_bayes._numerics.laplace_blocks import (
    DiagonalBlock,
    JointBlock,
    LaplaceBlock,
    Precision,
)
from torchprune_bayes.errors import NumericalError

ROWS, COLUMNS, SCALE = 4, 6, 0.7


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _positive(*shape: int, seed: int = 0) -> Tensor:
    return (1.5 * _random(*shape, seed=seed)).exp()


def _factor(size: int, seed: int, rank: int | None = None) -> Tensor:
    root = _random(size, rank or size + 2, seed=seed)
    return root @ root.mT


PRECISIONS = {
    "constant": (_positive(1, 1),),
    "rows": (_positive(ROWS, 1),),
    "columns": (_positive(1, COLUMNS),),
    "units": (_positive(ROWS, 1), _positive(1, COLUMNS, seed=1)),
    "entries": (_positive(ROWS, COLUMNS),),
}


def _blocks(factors: tuple[Tensor, Tensor]) -> dict[str, tuple[LaplaceBlock, Tensor]]:
    """Blocks of each kind, with the curvature they stand for, dense."""
    dense = reference.dense_curvature(factors)
    values, vectors = torch.linalg.eigh(dense)
    diagonal = dense.diagonal().reshape(ROWS, COLUMNS)
    return {
        "diagonal": (DiagonalBlock(diagonal), torch.diag(dense.diagonal())),
        "kronecker": (KroneckerBlock(*factors), dense),
        "joint": (JointBlock(vectors, values.clamp_min(0)), dense),
        "low rank": (JointBlock(vectors[:, -3:], values[-3:]), _rebuilt(vectors, values, 3)),
    }


def _rebuilt(vectors: Tensor, values: Tensor, rank: int) -> Tensor:
    return vectors[:, -rank:] * values[-rank:] @ vectors[:, -rank:].mT


def _shaped(block: LaplaceBlock, precision: Precision) -> Precision:
    if block.shape == precision.shape:
        return precision
    return Precision((precision.dense().reshape(-1, 1),), block.shape)


@pytest.mark.parametrize("structure", PRECISIONS)
@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "joint", "low rank"])
@pytest.mark.parametrize("rank", [None, 2])
def test_equals_the_dense_matrices(structure: str, kind: str, rank: int | None) -> None:
    precision = Precision(PRECISIONS[structure], (ROWS, COLUMNS))
    block, dense = _blocks((_factor(ROWS, 2, rank), _factor(COLUMNS, 3, rank)))[kind]
    delta = precision.dense().flatten()
    expected = SCALE * dense + torch.diag(delta)
    inverse = torch.linalg.inv(expected).diagonal()
    mine = _shaped(block, precision)
    torch.testing.assert_close(block.precisions(mine, SCALE).flatten(), expected.diagonal())
    torch.testing.assert_close(block.diagonal().flatten(), dense.diagonal())
    torch.testing.assert_close(mine.log_sum(), delta.log().sum())
    spectrum = torch.zeros(ROWS * COLUMNS, dtype=torch.float64)
    found = block.spectrum().flatten().sort().values
    spectrum[-len(found) :] = found
    torch.testing.assert_close(spectrum, torch.linalg.eigvalsh(dense), atol=1e-11, rtol=1e-9)
    assert block.is_exact(mine) == (not (kind == "kronecker" and structure == "entries"))
    if block.is_exact(mine):
        ratio = torch.logdet(expected) - delta.log().sum()
        torch.testing.assert_close(block.log_det_ratio(mine, SCALE), ratio, rtol=1e-11, atol=1e-10)
        torch.testing.assert_close(block.variances(mine, SCALE).flatten(), inverse)
        torch.testing.assert_close(
            block.effective_parameters(mine, SCALE).flatten(), 1 - delta * inverse
        )


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(shape=SHAPES, seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_projection_gives_a_lower_bound_of_the_evidence(
    shape: tuple[int, int], seed: int, scale: float
) -> None:
    factors = _factor(shape[0], seed), _factor(shape[1], seed + 1)
    delta = _positive(*shape, seed=seed + 2)
    precision = Precision((delta,), shape)
    found = KroneckerBlock(*factors).log_det_ratio(precision, scale)
    exact = reference.log_det_ratio(factors, delta, scale)
    assert float(found) >= float(exact) - 1e-8 * (1 + abs(float(exact)))
    if min(shape) > 1:
        expected = reference.projected_log_det_ratio(factors, delta, scale)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)
    else:
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-8)


def test_the_bound_is_exact_where_the_prior_is_constant_in_other_words() -> None:
    factors = _factor(ROWS, 2), _factor(COLUMNS, 3)
    block = KroneckerBlock(*factors)
    constant = Precision((torch.full((1, 1), 2.0).double(),), (ROWS, COLUMNS))
    spelled_out = Precision((torch.full((ROWS, COLUMNS), 2.0).double(),), (ROWS, COLUMNS))
    for call in ("log_det_ratio", "variances", "effective_parameters", "smoothed_precisions"):
        torch.testing.assert_close(
            getattr(block, call)(constant, SCALE), getattr(block, call)(spelled_out, SCALE)
        )
    torch.testing.assert_close(
        block.smoothed_precisions(constant, SCALE), block.precisions(constant, SCALE)
    )


@pytest.mark.parametrize("structure", PRECISIONS)
@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "joint", "low rank"])
def test_what_is_determined_is_the_slope_of_the_determinant(structure: str, kind: str) -> None:
    factors = _factor(ROWS, 2), _factor(COLUMNS, 3)
    block, _ = _blocks(factors)[kind]
    precision = _shaped(block, Precision(PRECISIONS[structure], (ROWS, COLUMNS)))
    slopes = block.effective_parameters(precision, SCALE)
    dense = precision.dense().clone()
    step = 1e-6
    for row, column in ((0, 0), (block.shape[0] - 1, block.shape[1] - 1)):
        ratios = []
        for sign in (-1, 1):
            # An entry at a time is no separable change, so the exact kinds are compared densely.
            moved = dense.clone()
            moved[row, column] *= 1 + sign * step
            if kind == "kronecker" and block.is_exact(precision):
                ratios.append(reference.log_det_ratio(factors, moved, SCALE))
            else:
                ratios.append(block.log_det_ratio(Precision((moved,), block.shape), SCALE))
        slope = -(ratios[1] - ratios[0]) / (2 * step)
        torch.testing.assert_close(slopes[row, column], slope, rtol=1e-5, atol=1e-6)


def test_smoothing_keeps_the_sum_of_the_prior_and_averages_it() -> None:
    precision = Precision(PRECISIONS["entries"], (ROWS, COLUMNS))
    block = KroneckerBlock(_factor(ROWS, 2), _factor(COLUMNS, 3))
    smoothed = block.smoothed_precisions(precision, SCALE) - SCALE * block.diagonal()
    torch.testing.assert_close(smoothed.sum(), precision.dense().sum())
    assert float(smoothed.var()) < 0.5 * float(precision.dense().var())


def test_rows_and_columns_are_told_apart() -> None:
    rows, columns = torch.rand(3, 1) + 1, torch.rand(1, 4) + 1
    found = Precision((rows, columns, torch.full((1, 1), 2.0)), (3, 4)).separated()
    assert found is not None
    torch.testing.assert_close(found[0], 2 * rows.flatten())
    torch.testing.assert_close(found[1], columns.flatten())
    assert Precision((torch.rand(3, 4),), (3, 4)).separated() is None
    one_row = Precision((torch.rand(1, 4),), (1, 4)).separated()
    assert one_row is not None


def test_refuses_factors_that_are_not_finite() -> None:
    with pytest.raises(NumericalError, match="finite Kronecker factors"):
        KroneckerBlock(torch.full((2, 2), torch.nan), torch.eye(2))
