import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprune_bayes._numerics.post_update import PostUpdateObjective
from torchprune_bayes._numerics.swaps import SelectionObjective, swap_search

OBJECTIVES = [SelectionObjective, PostUpdateObjective]


@st.composite
def problems(draw):
    """Gradients, weights and a start with the same number kept in every block."""
    b, n = draw(st.integers(1, 3)), draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    gradients = torch.randn(b, draw(st.integers(1, 9)), n, generator=generator, dtype=dtype)
    if draw(st.booleans()):
        gradients[..., 0] = 0
    weights = torch.randn(b, n, generator=generator, dtype=dtype)
    kept = draw(st.integers(0, n))
    keep = torch.rand(b, n, generator=generator).argsort() < kept
    return gradients, weights, keep, draw(st.sampled_from([1e-3, 0.1, 10.0]))


def slow_value(kind, gradients, weights, keep, damping):
    """Both objectives from the Fisher itself, ``[blocks]``."""
    wide = gradients.double()
    eye = torch.eye(wide.shape[-1], dtype=torch.float64)
    values = []
    for g, w, k in zip(wide, weights.double(), keep, strict=True):
        fisher = g.mT @ g / len(g) + damping * eye
        if kind is PostUpdateObjective:
            fisher = torch.linalg.inv(fisher)[~k][:, ~k].inverse()
        else:
            fisher = fisher[~k][:, ~k]
        values.append(w[~k] @ fisher @ w[~k])
    return torch.stack(values)


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=40)
@given(problems())
def test_value_is_that_of_the_quadratic_model(kind, problem):
    found, expected = kind(*problem).value(), slow_value(kind, *problem)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=40)
@given(problems(), st.integers(1, 5), st.floats(0.0, 0.1))
def test_every_iteration_lowers_the_objective_and_keeps_the_counts(kind, problem, tile, epsilon):
    gradients, weights, keep, damping = problem
    before = slow_value(kind, *problem)
    for found in swap_search(kind(*problem), swap_range=tile, epsilon=epsilon):
        after = slow_value(kind, gradients, weights, found, damping)
        assert (after <= before + 1e-9 * before).all()
        assert (after < before).any()
        assert torch.equal(found.sum(-1), keep.sum(-1))
        before = after


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=40)
@given(problems())
def test_no_single_swap_improves_the_result(kind, problem):
    gradients, weights, keep, damping = problem
    start = slow_value(kind, *problem)
    keep = [keep, *swap_search(kind(*problem), epsilon=1e-9, max_iterations=1000)][-1]
    final = slow_value(kind, gradients, weights, keep, damping)
    for block in range(len(keep)):
        for i in (~keep[block]).nonzero().flatten():
            for j in keep[block].nonzero().flatten():
                other = keep.clone()
                other[block, i], other[block, j] = True, False
                changed = slow_value(kind, gradients, weights, other, damping)[block]
                assert changed >= final[block] - 1e-7 * start[block]


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=40)
@given(problems(), st.integers(2, 3))
def test_swaps_stay_within_groups(kind, problem, number):
    keep = problem[2]
    groups = torch.arange(keep.shape[-1]).expand_as(keep) % number
    for found in swap_search(kind(*problem), groups=groups):
        for group in range(number):
            chosen = groups == group
            assert torch.equal((found & chosen).sum(-1), (keep & chosen).sum(-1))


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=40)
@given(problems())
def test_blocks_are_searched_independently(kind, problem):
    gradients, weights, keep, damping = problem
    wide = gradients.double(), weights.double(), keep
    together = [keep, *swap_search(kind(*wide, damping))][-1]
    for block in range(len(keep)):
        alone = [part[block : block + 1] for part in wide]
        found = [alone[-1], *swap_search(kind(*alone, damping))][-1]
        torch.testing.assert_close(
            slow_value(kind, *alone[:2], found, damping),
            slow_value(kind, *alone[:2], together[block : block + 1], damping),
        )


def test_columns_that_cancel_are_pruned_together():
    gradients = torch.tensor([[[4.0, -4.0, 1.0, 1.0], [2.0, -2.0, 1.0, 0.0]]])
    start = torch.tensor([[False, True, False, True]])
    *_, found = swap_search(SelectionObjective(gradients, torch.ones(1, 4), start))
    assert found.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_nothing_to_swap_yields_nothing(kind):
    gradients, weights = torch.ones(1, 2, 3), torch.ones(1, 3)
    for keep in (torch.ones(1, 3).bool(), torch.zeros(1, 3).bool()):
        assert not list(swap_search(kind(gradients, weights, keep, 0.1)))


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=40)
@given(problems(), st.integers(1, 5))
def test_blocks_may_keep_different_numbers(kind, problem, tile):
    gradients, weights, keep, damping = problem
    keep = keep & (torch.arange(keep.shape[-1]) <= torch.arange(len(keep))[:, None])
    objective, before = kind(gradients, weights, keep, damping), None
    for found in swap_search(objective, swap_range=tile):
        assert torch.equal(found.sum(-1), keep.sum(-1))
        after = slow_value(kind, gradients, weights, found, damping)
        torch.testing.assert_close(objective.value(), after, rtol=1e-6, atol=1e-9)
        before = slow_value(kind, *problem[:2], keep, damping) if before is None else before
        assert (after <= before * (1 + 1e-9)).all()
        before = after


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=40)
@given(problems(), st.integers(2, 4), st.integers(1, 9))
def test_no_swap_within_a_group_improves_a_search_within_groups(kind, problem, size, tile):
    gradients, weights, keep, damping = problem
    gradients = gradients.repeat(1, 1, size) + torch.arange(keep.shape[-1] * size).cos()
    weights, keep = weights.repeat(1, size), keep.repeat(1, size)
    start = slow_value(kind, gradients, weights, keep, damping)
    options = {"epsilon": 1e-9, "max_iterations": 1000, "swap_range": tile, "max_no_match": 50}
    search = swap_search(kind(gradients, weights, keep, damping), within=size, **options)
    found = [keep, *search][-1]
    assert torch.equal(*(v.unflatten(-1, (-1, size)).sum(-1) for v in (found, keep)))
    final = slow_value(kind, gradients, weights, found, damping)
    for block, chosen in enumerate(found):
        for i in (~chosen).nonzero().flatten():
            for j in chosen.nonzero().flatten():
                if i // size != j // size:
                    continue
                other = found.clone()
                other[block, i], other[block, j] = True, False
                changed = slow_value(kind, gradients, weights, other, damping)[block]
                assert changed >= final[block] - 1e-6 * start[block]
