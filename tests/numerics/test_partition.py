from hypothesis import given
from hypothesis import strategies as st

from torchprune_bayes._numerics.partition import partition, runs_of_equal_size

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=6)
BLOCK = st.one_of(st.integers(1, 40), st.sampled_from(["full", "tensor"]))


@given(sizes=SIZES, block_size=BLOCK, across=st.booleans())
def test_blocks_cover_every_entry_once_and_in_order(sizes, block_size, across):
    blocks = partition(sizes, block_size, across_tensors=across)
    covered = [entry for start, stop in blocks for entry in range(start, stop)]
    assert covered == list(range(sum(sizes)))
    assert all(start < stop for start, stop in blocks)


@given(sizes=SIZES, block_size=st.integers(1, 40))
def test_blocks_stay_within_a_tensor(sizes, block_size):
    edges = {sum(sizes[:index]) for index in range(len(sizes) + 1)}
    for start, stop in partition(sizes, block_size):
        assert stop - start <= block_size
        assert not any(start < edge < stop for edge in edges)


@given(sizes=SIZES, block_size=st.integers(1, 40))
def test_runs_hold_blocks_of_one_size_and_all_of_them(sizes, block_size):
    blocks = partition(sizes, block_size)
    rebuilt = [
        (start + index * size, start + (index + 1) * size)
        for start, number, size in runs_of_equal_size(blocks)
        for index in range(number)
    ]
    assert rebuilt == blocks
