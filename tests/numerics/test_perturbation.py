import torch
from hypothesis import given
from hypothesis import strategies as st

from torchprune_bayes._numerics.perturbation import apportion, perturbed_in_groups, perturbed_keep


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any), st.data())
def test_shares_are_exact_in_sum_and_within_one_of_the_proportion(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    shares = apportion(total, torch.tensor(sizes))
    assert int(shares.sum()) == total
    for share, size in zip(shares.tolist(), sizes, strict=True):
        assert abs(share * sum(sizes) - total * size) < sum(sizes)
        assert 0 <= share <= size


@given(st.integers(1, 400), st.data())
def test_exactly_as_many_are_kept_as_asked(entries, data):
    kept = data.draw(st.integers(0, entries))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    scores = torch.randn(entries, generator=generator)
    assert int(perturbed_keep(scores, kept, generator).sum()) == kept


@given(st.integers(4, 400), st.integers(0, 1000))
def test_the_draw_follows_the_seed(entries, seed):
    scores = torch.randn(entries, generator=torch.Generator().manual_seed(seed))
    draws = [
        perturbed_keep(scores, entries // 2, torch.Generator().manual_seed(other))
        for other in (seed, seed)
    ]
    assert torch.equal(*draws)


def test_other_seeds_give_other_masks():
    scores = torch.arange(400.0)
    draws = {
        tuple(perturbed_keep(scores, 100, torch.Generator().manual_seed(seed)).tolist())
        for seed in range(5)
    }
    assert len(draws) == 5


@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 99))
def test_groups_keep_exactly_as_many_as_they_should(groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(groups, size, generator=generator)
    scores[torch.rand(groups, size, generator=generator) < 0.3] = -1.0  # cannot be kept
    kept = (scores >= 0).sum(-1).clamp_max(size // 2)
    found = perturbed_in_groups(scores, kept, generator)
    assert torch.equal(found.sum(-1), kept)
    assert not (found & (scores < 0)).any()
