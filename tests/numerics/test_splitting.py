"""Masks by operator splitting, beside the literal algorithm and the best of all masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.numerics.test_layer_update import layer
from tests.references.layer_update import alps, solved_rows
from torchprune_bayes._numerics.layer_update import damped, sweep
from torchprune_bayes._numerics.selection import smallest_k
from torchprune_bayes._numerics.splitting import splitting_mask


def largest(kept):
    def project(values):
        everything = torch.ones_like(values, dtype=torch.bool)
        return smallest_k([values.square()], values.numel() - kept, [everything])[0]

    return project


def error(gram, weights, keep):
    change = weights - solved_rows(gram, weights, keep)
    return float(((change @ gram) * change).sum())


@given(
    rows=st.integers(1, 6),
    columns=st.integers(2, 9),
    seed=st.integers(0, 50),
    share=st.floats(0.1, 0.9),
    penalty=st.sampled_from([0.01, 0.1, 10.0]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_mask_is_that_of_the_literal_algorithm(rows, columns, seed, share, penalty):
    gram, weights, _ = layer(rows, columns, seed)
    kept = max(1, round(share * weights.numel()))
    found, sparse = splitting_mask(gram, weights, largest(kept), penalty=penalty, steps=60)
    assert torch.equal(found, alps(gram, weights, kept, penalty, 60))
    assert int(found.sum()) == kept
    assert not sparse[~found].any()


def test_correlated_inputs_are_pruned_better_than_by_size_and_by_columns():
    generator = torch.Generator().manual_seed(0)
    mix, inputs, weights = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((32, 32), (128, 32), (8, 32))
    )
    inputs = inputs @ mix
    gram, kept = damped(inputs.mT @ inputs / 128, 0.01), round(0.3 * weights.numel())

    def smallest(columns, values, costs):
        everything = torch.ones_like(costs, dtype=torch.bool)
        return smallest_k([costs], costs.numel() - kept, [everything])[0]

    found, _ = splitting_mask(gram, weights, largest(kept), penalty=0.1, steps=300)
    _, by_columns = sweep(gram, weights, smallest)
    by_size = largest(kept)(weights * gram.diagonal().sqrt())
    others = min(error(gram, weights, keep) for keep in (by_columns, by_size))
    assert error(gram, weights, found) < 0.8 * others


@given(columns=st.integers(2, 6), seed=st.integers(0, 200), share=st.floats(0.2, 0.8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_returned_is_no_worse_than_the_largest_weights_as_they_were(columns, seed, share):
    gram, weights, _ = layer(2, columns, seed)
    kept = max(1, round(share * weights.numel()))
    _, sparse = splitting_mask(gram, weights, largest(kept), penalty=0.1, steps=60)
    by_size = weights * largest(kept)(weights * gram.diagonal().sqrt())
    found, plain = (weights - values for values in (sparse, by_size))
    assert ((found @ gram) * found).sum() <= ((plain @ gram) * plain).sum() * (1 + 1e-9)


@pytest.mark.parametrize("kept", [0, 12])
def test_all_or_nothing_is_kept(kept):
    gram, weights, _ = layer(2, 6, seed=0)
    found, sparse = splitting_mask(gram, weights, largest(kept), penalty=0.1, steps=300)
    assert int(found.sum()) == kept
    torch.testing.assert_close(sparse, weights * found)
