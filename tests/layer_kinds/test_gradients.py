from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprune_bayes.layer_kinds import outer_products
from torchprune_bayes.layer_kinds.embedding import EmbeddingRows
from torchprune_bayes.layer_kinds.gradients import DenseGradients, SampleGradients, add_squares
from torchprune_bayes.layer_kinds.grams import Gram
from torchprune_bayes.layer_kinds.outer_products import OuterProducts

_SIZES = st.integers(1, 5)


def _outer(generator: torch.Generator, sizes: tuple[int, ...], *, flip: bool) -> OuterProducts:
    samples, groups, rows, columns, positions = sizes
    left = torch.randn(samples, groups, rows, positions, generator=generator).double()
    right = torch.randn(samples, groups, columns, positions, generator=generator).double()
    shape = (groups * rows, columns)
    return OuterProducts(
        left, right.__getitem__, groups * columns * positions, shape, inputs_left=flip
    )


def _multiplied_out(uses: list[OuterProducts]) -> Tensor:
    total = sum(torch.einsum("ngmt,ngkt->ngmk", u.left, u.right(slice(None))) for u in uses)
    assert isinstance(total, Tensor)
    return total.flatten(1, 2)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(_SIZES, _SIZES, _SIZES, _SIZES), st.lists(st.integers(1, 9), min_size=1, max_size=3)
)
def test_squares_of_sums_over_positions_and_uses(
    sizes: tuple[int, int, int, int], positions: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    uses = [_outer(generator, (*sizes, t), flip=False) for t in positions]
    expected = _multiplied_out(uses).square().sum(0)
    total = torch.ones_like(expected)
    add_squares(uses, total)
    torch.testing.assert_close(total, 1 + expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 300, 10**9])
@pytest.mark.parametrize("positions", [1, 9])
def test_samples_may_be_taken_in_parts(
    budget: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer_products, "CACHE_BYTES", {"cpu": budget, "cuda": budget})
    monkeypatch.setattr(outer_products, "PATCH_BYTES", {"cpu": budget, "cuda": budget})
    use = _outer(torch.Generator().manual_seed(0), (7, 2, 3, 4, positions), flip=False)
    total = torch.zeros(6, 4, dtype=torch.float64)
    use.add_squares(total)
    torch.testing.assert_close(total, _multiplied_out([use]).square().sum(0))
    one = _outer(torch.Generator().manual_seed(0), (7, 1, 3, 4, positions), flip=False)
    found = one.new_input_gram(one.left)
    one.add_input_gram(found)
    torch.testing.assert_close(
        found.matrix(),
        torch.einsum("ngkt,nglt->kl", one.right(slice(None)), one.right(slice(None))),
    )


@pytest.mark.parametrize("budget", [1, 10**9])
def test_uses_of_several_kinds_are_added_before_squaring(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer_products, "CACHE_BYTES", {"cpu": budget, "cuda": budget})
    generator = torch.Generator().manual_seed(0)
    outer = _outer(generator, (4, 1, 5, 3, 6), flip=False)
    indices = torch.randint(-1, 5, (4, 7), generator=generator)
    g = torch.randn(4, 7, 3, generator=generator).double()
    dense = torch.randn(4, 5, 3, generator=generator).double()
    uses: list[SampleGradients] = [
        outer,
        EmbeddingRows(indices, g, (5, 3)),
        EmbeddingRows(indices[:, :2], g[:, :2], (5, 3)),
        DenseGradients(dense),
    ]
    expected = _multiplied_out([outer]) + dense
    for n in range(4):
        for t in range(7):
            if indices[n, t] >= 0:
                expected[n, indices[n, t]] += g[n, t] * (2 if t < 2 else 1)
    total = torch.zeros(5, 3, dtype=torch.float64)
    add_squares(uses, total)
    torch.testing.assert_close(total, expected.square().sum(0), rtol=1e-12, atol=1e-12)


def test_which_gram_is_whose() -> None:
    for flip in (False, True):
        use = _outer(torch.Generator().manual_seed(0), (4, 1, 2, 3, 5), flip=flip)
        left, right = use.left[:, 0], use.right(slice(None))[:, 0]
        grams = [torch.einsum("nit,njt->ij", side, side) for side in (left, right)]
        outputs, inputs = reversed(grams) if flip else grams
        of_outputs, of_inputs = Gram(use.factor_sizes[0], left), use.new_input_gram(left)
        use.add_output_gram(of_outputs)
        use.add_input_gram(of_inputs)
        torch.testing.assert_close(of_outputs.matrix(), outputs)
        torch.testing.assert_close(of_inputs.matrix(), inputs)
