"""Products of many small blocks in float32: where they are taken, against float64 twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.references import fisher as reference
from torchprune_bayes._numerics.fisher_blocks import small_blocks_diagonal
from torchprune_bayes._numerics.gradient_tiles import chosen_columns, columns_of, damped_gram, gram
from torchprune_bayes._numerics.obs import joint_directions


@st.composite
def many_blocks(draw: st.DrawFn) -> tuple[Tensor, float]:
    """Float32 gradients ``[blocks, N, B]`` of any scale, some alike, and a damping."""
    number, count = draw(st.integers(2, 4)), draw(st.sampled_from([1, 3, 16, 34, 48, 66]))
    size = draw(st.integers(count + count // 8 + 1, 3 * count + 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    gradients = torch.randn(number, count, size, generator=generator)
    if draw(st.booleans()):
        gradients += 3.0 * torch.randn(number, 1, size, generator=generator)
    gradients[0] *= 10.0 ** draw(st.integers(-3, 2))
    scale = 10.0 ** draw(st.integers(-4, 4))
    return gradients * scale, scale**2 * 10.0 ** draw(st.integers(-6, 2))


@given(case=many_blocks())
@settings(deadline=None, max_examples=80)
def test_the_diagonal_of_many_blocks_is_that_of_dense_inverses(case):
    gradients, damping = case
    found = small_blocks_diagonal(gradients, damping)
    assert found.dtype == torch.float64
    for block, diagonal in zip(gradients.double(), found, strict=True):
        fisher = reference.damped_fisher(block, damping)
        exact = torch.linalg.inv(fisher).diagonal()
        # ``1 − ΣX²`` is rounded to float32 where it is subtracted.
        torch.testing.assert_close(diagonal, exact, rtol=1e-2, atol=2e-5 / damping)
        assert (diagonal >= 1.0 / fisher.diagonal() * (1 - 1e-6)).all()
        assert (diagonal <= 1.0 / damping * (1 + 1e-6)).all()


@given(case=many_blocks(), share=st.sampled_from([0.0, 0.1, 0.4, 0.8, 1.0]))
@settings(deadline=None, max_examples=80)
def test_the_update_of_many_blocks_is_the_exact_one_within_a_per_cent(case, share):
    """In the norm that counts, that of the Fisher: by how much the quadratic model rises."""
    gradients, damping = case
    weights = torch.randn(gradients.shape[::2])
    keep = torch.rand(weights.shape) < share
    given = joint_directions(gradients, damping, weights, keep, diagonal=True)
    found = given.compensation.double()
    for g, k, diagonal in zip(gradients.double(), keep, given.diagonal, strict=True):
        exact = torch.linalg.inv(reference.damped_fisher(g[:, k], damping)).diagonal()
        torch.testing.assert_close(diagonal[k], exact, rtol=1e-2, atol=2e-5 / damping)
    for g, w, k, update in zip(gradients.double(), weights.double(), keep, found, strict=True):
        fisher, exact = (
            reference.damped_fisher(g, damping),
            reference.joint_update(g, damping, w, k, 0.0),
        )
        worst = torch.where(k, 0.0, w)
        error = update - exact
        assert error @ fisher @ error <= 1e-4 * (worst @ fisher @ worst)
        assert torch.equal(update[~k], -w[~k])


@pytest.mark.parametrize("relative", [1e-6, 1e-5, 1e-4, 1e-2])
def test_float32_is_taken_where_the_ridge_covers_its_rounding(relative):
    gradients = torch.randn(3, 8, 40)
    gradients[1] *= 30.0
    trace = float(gradients.square().sum((1, 2)).max())
    found = damped_gram(gradients, relative * trace)
    narrow = torch.finfo(torch.float32).eps <= 1e-2 * relative
    assert found.dtype == (torch.float32 if narrow else torch.float64)
    torch.testing.assert_close(found.double(), gram(gradients), rtol=1e-4, atol=1e-5 * trace)


def test_products_of_many_rows_fill_the_lower_triangle():
    gradients = torch.randn(2, 150, 200)
    exact = gradients.double() @ gradients.double().mT
    torch.testing.assert_close(gram(gradients), exact, rtol=1e-10, atol=1e-10)
    lower = damped_gram(gradients, 1e6).double().tril()
    torch.testing.assert_close(lower, exact.tril(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "gradients",
    [
        pytest.param(torch.randn(1, 4, 20), id="one block"),
        pytest.param(torch.randn(2, 4, 20, dtype=torch.float64), id="float64"),
        pytest.param(torch.full((2, 4, 20), float("nan")), id="not finite"),
        pytest.param(torch.full((2, 4, 20), 3e38), id="overflow"),
    ],
)
def test_float64_is_taken_elsewhere(gradients):
    assert damped_gram(gradients, 1e6).dtype == torch.float64


def test_chosen_columns_do_not_depend_on_the_memory_format():
    rows = torch.randn(5, 3 * 7)
    view = rows.unflatten(1, (3, 7)).transpose(0, 1)
    indices = torch.tensor([[6, 0], [1, 1], [3, 5]])
    expected = torch.stack([view[b][:, indices[b]] for b in range(3)])
    for gradients in (view, view.contiguous(), view.contiguous()[:, ::1]):
        assert torch.equal(chosen_columns(gradients, indices), expected)
    assert torch.equal(columns_of(rows, indices.flatten()), rows[:, indices.flatten()])
