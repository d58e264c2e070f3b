import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprune_bayes._numerics.fisher_blocks import invert
from torchprune_bayes._numerics.greedy import Removals, greedy_group_removals, greedy_removals
from torchprune_bayes._numerics.obs import joint_directions


@st.composite
def blocks(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    number, count, size = (draw(st.integers(1, high)) for high in (3, 9, 8))
    gradients = torch.randn(number, count, size, generator=generator, dtype=torch.float64)
    weights = torch.randn(number, size, generator=generator, dtype=torch.float64)
    return gradients, weights, draw(st.sampled_from([1e-3, 0.1, 10.0]))


def fishers(gradients, damping):
    eye = torch.eye(gradients.shape[-1], dtype=torch.float64)
    return gradients.mT @ gradients / gradients.shape[-2] + damping * eye


@settings(max_examples=40)
@given(blocks(), st.data())
def test_costs_add_up_to_the_rise_of_the_quadratic_model(problem, data):
    gradients, weights, damping = problem
    record = greedy_removals(invert(gradients, damping), weights)
    removed = data.draw(st.integers(0, weights.shape[-1]))
    keep = torch.ones_like(weights).bool().scatter(-1, record.order[:, :removed], False)
    step = joint_directions(gradients, damping, weights, keep).compensation.unsqueeze(-1)
    rise = (step.mT @ fishers(gradients, damping) @ step).flatten() / 2
    torch.testing.assert_close(record.costs[:, :removed].sum(-1), rise, rtol=1e-7, atol=1e-10)


@settings(max_examples=40)
@given(blocks())
def test_each_removal_is_the_cheapest_of_those_left(problem):
    gradients, weights, damping = problem
    record = greedy_removals(invert(gradients, damping), weights)
    for block, (fisher, w) in enumerate(zip(fishers(gradients, damping), weights, strict=True)):
        removed = []
        paid = 0.0
        for step in range(len(w)):
            totals = {}
            for other in set(range(len(w))) - set(removed):
                pruned = [*removed, other]
                schur = fisher.inverse()[pruned][:, pruned].inverse()
                totals[other] = float(w[pruned] @ schur @ w[pruned]) / 2
            removed.append(int(record.order[block, step]))
            assert totals[removed[-1]] <= min(totals.values()) + 1e-9 * (1 + paid)
            paid = totals[removed[-1]]


@settings(max_examples=40)
@given(blocks(), st.data())
def test_a_pattern_keeps_n_of_every_m(problem, data):
    gradients, weights, damping = problem
    size = data.draw(st.sampled_from([m for m in (1, 2, 3, 4) if weights.shape[-1] % m == 0]))
    kept = data.draw(st.integers(0, size))
    record = greedy_removals(invert(gradients, damping), weights, kept=kept, size=size)
    every = torch.arange(weights.shape[-1]).expand_as(record.order)
    assert torch.equal(record.order.sort().values, every)
    keep = torch.zeros_like(weights).scatter(-1, record.order, record.costs.isinf().double())
    assert (keep.unflatten(-1, (-1, size)).sum(-1) == kept).all()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_scores_rank_the_entries_of_a_block_in_the_order_of_removal(costs, random):
    order = list(range(len(costs)))
    random.shuffle(order)
    record = Removals(torch.tensor([order]), torch.tensor([costs], dtype=torch.float64))
    scores = record.scores()[0]
    assert scores.argsort().tolist() == order
    assert len(set(scores.tolist())) == len(costs)


@settings(max_examples=30)
@given(blocks(), st.integers(1, 3))
def test_groups_are_removed_as_by_trying_every_group_with_a_dense_inverse(problem, size):
    gradients, weights, damping = problem
    gradients, weights = gradients.repeat(1, 1, size), weights.repeat(1, size)
    gradients = gradients + torch.arange(gradients.shape[-1]).double().cos()
    record = greedy_group_removals(invert(gradients, damping), weights, size)
    for block, fisher in enumerate(fishers(gradients, damping)):
        inverse, places = torch.linalg.inv(fisher), torch.arange(len(fisher)).split(size)
        gone = []
        before = 0.0
        for group, found in zip(record.order[block], record.costs[block], strict=True):
            rises = {}
            for other in set(range(len(places))) - set(gone):
                chosen = torch.cat([places[i] for i in [*gone, other]])
                w = weights[block, chosen]
                rises[other] = float(w @ inverse[chosen][:, chosen].inverse() @ w) / 2
            least = min(rises.values())
            assert rises[int(group)] - before <= (least - before) * (1 + 1e-6) + 1e-9
            assert float(found) == pytest.approx(rises[int(group)] - before, rel=1e-5, abs=1e-9)
            gone.append(int(group))
            before = rises[int(group)]


@settings(max_examples=30)
@given(blocks())
def test_groups_of_one_are_single_weights(problem):
    gradients, weights, damping = problem
    inverse = invert(gradients, damping)
    alone, groups = greedy_removals(inverse, weights), greedy_group_removals(inverse, weights, 1)
    assert torch.equal(alone.order, groups.order)
    torch.testing.assert_close(alone.costs, groups.costs)


def test_what_is_pruned_already_goes_first_and_counts_in_its_group():
    inverse = invert(torch.zeros(1, 1, 4), damping=1.0)
    weights = torch.tensor([[0.0, 0.0, 3.0, 2.0]])
    remaining = torch.tensor([[True, False, True, True]])
    record = greedy_removals(inverse, weights, kept=2, size=4, remaining=remaining)
    assert record.order[0, :2].tolist() == [1, 0]
    remaining[0, 3] = remaining[0, 2] = False  # one more than the pattern asks for: none is removed
    record = greedy_removals(inverse, weights, kept=2, size=4, remaining=remaining)
    assert 0 not in record.order[0, :2].tolist()
