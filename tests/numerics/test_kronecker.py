from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.references.second_order import damped_kronecker_product
from torchprune_bayes._numerics.kronecker import KroneckerInverse
from torchprune_bayes.errors import NumericalError


def _factor(size: int, rank: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return root @ root.mT / rank


@given(
    seed=st.integers(0, 2**31),
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rank=st.integers(1, 4),
    damping=st.sampled_from([1e-4, 1e-2, 1.0]),
    pi=st.booleans(),
)
def test_is_the_inverse_of_the_dense_product(
    seed: int, sides: tuple[int, int], rank: int, damping: float, pi: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (_factor(side, rank, generator) for side in sides)
    dense = torch.linalg.inv(damped_kronecker_product(rows, columns, damping, pi=pi))
    matrix = torch.randn(sides, generator=generator, dtype=torch.float64)
    inverse = KroneckerInverse(rows, columns, damping, pi=pi)
    torch.testing.assert_close(inverse.diagonal().flatten(), dense.diagonal())
    torch.testing.assert_close(inverse.solve(matrix).flatten(), dense @ matrix.flatten())


def test_pi_makes_the_inverse_independent_of_how_the_scale_is_shared_out() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = _factor(3, 2, generator), _factor(4, 2, generator)
    matrix = torch.ones(3, 4)
    solved = KroneckerInverse(rows, columns, 0.1, pi=True).solve(matrix)
    moved = KroneckerInverse(rows * 100, columns / 100, 0.1, pi=True).solve(matrix)
    torch.testing.assert_close(moved, solved)


def test_a_zero_factor_leaves_pi_at_one() -> None:
    rows, columns = torch.zeros(2, 2).double(), torch.eye(3).double()
    with_pi = KroneckerInverse(rows, columns, 0.25, pi=True).diagonal()
    torch.testing.assert_close(with_pi, torch.full((2, 3), 1 / (0.5 * 1.5)).double())


def test_float32_matrices_are_solved_in_float64() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    assert KroneckerInverse(eye, eye, 1.0).solve(torch.ones(2, 2)).dtype == torch.float64


def test_refuses_a_factor_that_is_not_finite() -> None:
    with pytest.raises(NumericalError, match="Expected a finite matrix"):
        KroneckerInverse(torch.full((1, 1), float("nan")).double(), torch.eye(1).double(), 1.0)
