"""The fast updates of a layer's weights beside their literal forms."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.references.layer_update import solved_rows, sparse_gpt, swept
from torchprune_bayes._numerics.layer_update import damped, descend_rows, solve_rows, sweep
from torchprune_bayes._numerics.selection import smallest_k


def layer(rows: int, columns: int, seed: int, keep: float = 0.5):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    inputs[:, columns // 2] *= 10.0
    weights = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < keep
    return damped(inputs.mT @ inputs / len(inputs), 0.01), weights, mask


CASES = given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    seed=st.integers(0, 50),
    keep=st.floats(0, 1),
)


@CASES
@settings(max_examples=30, deadline=None, derandomize=True)
def test_every_row_is_solved_exactly(rows, columns, seed, keep):
    gram, weights, mask = layer(rows, columns, seed, keep)
    found = solve_rows(gram, weights, mask)
    torch.testing.assert_close(found, solved_rows(gram, weights, mask))
    assert not found[~mask].any()


@CASES
@settings(max_examples=30, deadline=None, derandomize=True)
def test_descending_gets_nearer_at_every_step_and_there_in_the_end(rows, columns, seed, keep):
    gram, weights, mask = layer(rows, columns, seed, keep)
    found = [descend_rows(gram, weights, mask, steps) for steps in range(2 * columns + 2)]
    changes = torch.stack([(((weights - new) @ gram) * (weights - new)).sum(1) for new in found])
    torch.testing.assert_close(found[0], weights * mask)
    assert (changes[1:] <= changes[:-1] * (1 + 1e-9) + 1e-12).all()
    torch.testing.assert_close(found[-1], solved_rows(gram, weights, mask), atol=1e-6, rtol=1e-6)
    assert not any(new[~mask].any() for new in found)


def test_descending_in_single_precision_goes_on_where_nothing_is_left_to_do():
    gram, weights, mask = layer(6, 9, seed=2)
    found = descend_rows(gram, weights.float(), mask, 200)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, solved_rows(gram, weights, mask).float(), atol=1e-4, rtol=1e-4
    )


@CASES
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_sweep_is_the_surgeon_on_one_column_after_the_other(rows, columns, seed, keep):
    gram, weights, mask = layer(rows, columns, seed, keep)
    found, kept = sweep(gram, weights, lambda c, values, costs: mask[:, c], group=2, block=4)
    torch.testing.assert_close(found, swept(gram, weights, mask))
    assert torch.equal(kept, mask)


def test_the_mask_of_the_sweep_is_sparsegpts():
    gram, weights, _ = layer(6, 12, seed=3)

    def smallest(columns, values, costs):
        return smallest_k([costs], round(0.5 * costs.numel()), [torch.ones_like(costs).bool()])[0]

    found, _ = sweep(gram, weights, smallest, group=4, block=4)
    torch.testing.assert_close(found, sparse_gpt(gram, weights, 0.5, block=4))


@CASES
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_exact_solution_is_never_worse(rows, columns, seed, keep):
    gram, weights, mask = layer(rows, columns, seed, keep)

    def error(new):
        return float((((weights - new) @ gram) * (weights - new)).sum())

    exact = error(solve_rows(gram, weights, mask))
    cheap = error(sweep(gram, weights, lambda c, values, costs: mask[:, c])[0])
    assert exact <= cheap * (1 + 1e-9) + 1e-12
    assert exact <= error(weights * mask) * (1 + 1e-9) + 1e-12


def test_rows_with_more_and_less_kept_than_fit_at_once(monkeypatch):
    from torchprune_bayes._numerics import layer_update

    monkeypatch.setitem(layer_update._BYTES, "cpu", 8 * 5**2 * 2)
    gram, weights, mask = layer(9, 8, seed=1)
    torch.testing.assert_close(solve_rows(gram, weights, mask), solved_rows(gram, weights, mask))


def test_inputs_that_never_vary_leave_their_weights():
    gram = damped(torch.diag(torch.tensor([1.0, 0.0, 2.0])), 0.01)
    weights, mask = torch.ones(1, 3), torch.tensor([[True, True, False]])
    expected = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(solve_rows(gram, weights, mask), expected)
