import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.references.fisher import damped_fisher, inverse_by_recursion
from torchprune_bayes._numerics.cholesky import checked_once, damped_factor_inverse, safe_cholesky
from torchprune_bayes._numerics.fisher_blocks import (
    PrimalInverse,
    SampleSpace,
    SampleSpaceInverse,
    SpectralInverse,
    inverse_diagonals,
    invert,
)
from torchprune_bayes._numerics.gradient_tiles import gram, times, transposed_times
from torchprune_bayes.errors import NumericalError, NumericalWarning

FORMS = [SampleSpaceInverse, PrimalInverse, SpectralInverse]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, float]:
    """Gradients ``[blocks, N, B]`` with masked columns, duplicated and zero rows, and a damping."""
    number, size = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    count = draw(st.sampled_from([1, max(size - 1, 1), size, size + 1, 3 * size]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    gradients = torch.randn(number, count, size, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        gradients[:, :, torch.rand(size, generator=generator) < 0.3] = 0.0
    if draw(st.booleans()):
        gradients[:, count // 2 :] = gradients[:, :1]
    if draw(st.booleans()):
        gradients[:, 0] = 0.0
    return gradients, 10.0 ** draw(st.integers(-4, 0))


@pytest.mark.parametrize("form", FORMS)
@given(case=blocks())
@settings(deadline=None, max_examples=60)
def test_inverse_equals_the_rank_one_recursion_and_a_dense_inverse(form, case):
    gradients, damping = case
    inverse = form(gradients, damping)
    everything = torch.arange(gradients.shape[-1]).expand(len(gradients), -1)
    columns, diagonal = inverse.columns(everything), inverse.inverse_diagonal()
    for block in range(len(gradients)):
        dense = torch.linalg.inv(damped_fisher(gradients[block], damping))
        scale = dense.abs().max()
        assert (columns[block] - dense).abs().max() <= 1e-10 * scale
        recursion = inverse_by_recursion(gradients[block], damping)
        assert (columns[block] - recursion).abs().max() <= 1e-10 * scale
        assert (diagonal[block] - dense.diagonal()).abs().max() <= 1e-10 * scale


@pytest.mark.parametrize("form", FORMS)
@given(case=blocks())
@settings(deadline=None, max_examples=40)
def test_laws_of_the_inverse(form, case):
    gradients, damping = case
    inverse = form(gradients, damping)
    vectors = torch.randn(inverse.shape, dtype=torch.float64)
    fisher = torch.stack([damped_fisher(block, damping) for block in gradients])
    residual = (fisher @ inverse.solve(vectors).unsqueeze(-1)).squeeze(-1) - vectors
    condition = fisher.abs().sum(-1).max() / damping
    assert residual.abs().max() <= 1e-13 * condition * vectors.abs().max()
    diagonal = inverse.inverse_diagonal()
    squares = gradients.square().mean(-2)
    assert (diagonal <= 1.0 / damping).all()
    assert (diagonal >= 1.0 / (damping + squares) * (1 - 1e-12)).all()
    assert (diagonal[squares == 0] == 1.0 / damping).all()


@given(case=blocks())
@settings(deadline=None, max_examples=30)
def test_order_of_gradients_does_not_matter(case):
    gradients, damping = case
    shuffled = gradients[:, torch.randperm(gradients.shape[1])]
    first, second = (invert(g, damping).inverse_diagonal() for g in (gradients, shuffled))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("form", [SampleSpaceInverse, SpectralInverse])
def test_float32_gradients_keep_six_digits_at_the_paper_damping(form):
    # Gradients of very different sizes, condition number about 10⁶, as on MLPNet.
    scales = torch.logspace(-2.5, 0.5, 500, dtype=torch.float64)
    gradients = torch.randn(1, 100, 500, dtype=torch.float64) * scales
    exact = invert(gradients, 1e-5).inverse_diagonal()
    rounded = form(gradients.float(), 1e-5).inverse_diagonal()
    dense = torch.linalg.inv(damped_fisher(gradients[0], 1e-5)).diagonal()
    torch.testing.assert_close(exact[0], dense, rtol=1e-8, atol=0.0)
    assert ((rounded - exact) / exact).abs().max() < 1e-3
    assert ((rounded - exact) / exact).abs().median() < 1e-6


def test_the_cheaper_form_is_taken():
    assert isinstance(invert(torch.randn(1, 5, 20), 1.0), SampleSpaceInverse)
    assert isinstance(invert(torch.randn(1, 20, 20), 1.0), PrimalInverse)


def test_many_dampings_share_one_spectrum_where_samples_are_few():
    few, many = torch.randn(1, 5, 40), torch.randn(1, 6, 40)
    space = SampleSpace.of(few)
    first, second = space.inverse(few, 1.0), space.inverse(few, 2.0)
    assert isinstance(first, SpectralInverse)
    assert isinstance(second, SpectralInverse)
    assert first.space is second.space
    assert isinstance(SampleSpace.of(many).inverse(many, 1.0), SampleSpaceInverse)


@given(case=blocks())
@settings(deadline=None, max_examples=30)
def test_diagonals_for_several_dampings_are_those_of_each(case):
    gradients, damping = case
    dampings = [damping, 3.0 * damping]
    found = inverse_diagonals(gradients, SampleSpace.of(gradients), dampings)
    for one, diagonal in zip(dampings, found, strict=True):
        dense = torch.linalg.inv(torch.stack([damped_fisher(g, one) for g in gradients]))
        expected = dense.diagonal(dim1=-2, dim2=-1)
        assert (diagonal - expected).abs().max() <= 1e-10 * expected.max()


def test_tiled_products_equal_plain_ones():
    wide = torch.randn(2, 3, 20_000)
    columns = torch.randn(2, 20_000, 2, dtype=torch.float64)
    keep = torch.rand(2, 20_000) < 0.3
    exact = wide.double()
    torch.testing.assert_close(gram(wide), exact @ exact.mT)
    kept = exact * keep.unsqueeze(1)
    torch.testing.assert_close(gram(wide, keep), kept @ kept.mT)
    torch.testing.assert_close(gram(wide[:1], keep[:1]), (kept @ kept.mT)[:1])
    torch.testing.assert_close(times(exact, columns), exact @ columns)
    torch.testing.assert_close(times(wide, columns), exact @ columns, rtol=1e-4, atol=1e-3)
    tall = torch.randn(2, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(transposed_times(exact, tall), exact.mT @ tall)
    torch.testing.assert_close(transposed_times(wide, tall), exact.mT @ tall, rtol=1e-4, atol=1e-5)


def test_cholesky_reports_its_jitter():
    # Rank one: positive semi-definite, so only rounding keeps it from factorising.
    column = torch.tensor([[1.0], [1.0 / 3.0], [0.1]], dtype=torch.float64)
    matrix = column @ column.T
    matrix[2, 2] -= 1e-14
    with pytest.warns(NumericalWarning, match="of the mean diagonal added"):
        factor = safe_cholesky(matrix)
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 16, 18, 24, 35, 64, 150])
def test_an_inverse_factor_by_halves_is_that_of_the_factor(size):
    root = torch.randn(3, size, size + 2, dtype=torch.float64)
    matrix = root @ root.mT
    expected = torch.linalg.inv(torch.linalg.cholesky(matrix + 0.1 * torch.eye(size).double()))
    found = damped_factor_inverse(matrix.tril(), 0.1)  # the rest is not read
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_a_factor_that_fails_by_halves_gets_jitter_or_is_refused():
    column = torch.ones(2, 40, 1, dtype=torch.float64)
    alike = column @ column.mT
    with pytest.warns(NumericalWarning, match="of the mean diagonal added"):
        found = checked_once(lambda: damped_factor_inverse(alike, -1e-13))
    assert torch.isfinite(found).all()
    with pytest.raises(NumericalError, match="positive definite"):
        checked_once(lambda: damped_factor_inverse(-alike, 0.1))


def test_cholesky_refuses_what_is_not_rounding():
    with pytest.raises(NumericalError, match="positive definite"):
        safe_cholesky(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))
    with pytest.raises(NumericalError, match="finite"):
        safe_cholesky(torch.full((2, 2), torch.nan, dtype=torch.float64))
