import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from torchprune_bayes.calibration._stream import SampleStream
from torchprune_bayes.calibration.batches import (
    batch_size,
    map_tensors,
    samples_in,
    sizes,
    tensors_in,
)
from torchprune_bayes.errors import ArgumentTypeError, CalibrationError


def numbered(*batches: int) -> list[tuple[Tensor, Tensor]]:
    """Batches whose samples are numbered through."""
    parts = torch.arange(sum(batches)).split(batches)
    return [(part.double(), part) for part in parts]


def drawn(data: Any, *group_sizes: int, seed: int = 0) -> list[list[int]]:
    """Numbers of the samples in each group."""
    groups = SampleStream(data, seed, None).pieces(group_sizes)
    return [[int(x) for piece in group for x in piece[0]] for group in groups]


class Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Ten samples, numbered through, with random numbers of every kind in the target."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor(float(index)), torch.tensor(noise)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[float, float]]:
        for _ in range(6):
            yield random.random(), float(torch.rand(()))


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
def test_groups_cut_the_samples_in_order_whatever_the_batches(
    batches: list[int], groups: list[int]
) -> None:
    found = drawn(numbered(*batches), *groups)
    everything = [number for group in found for number in group]
    assert everything == list(range(min(sum(batches), sum(groups))))
    complete = len(found) if sum(groups) <= sum(batches) else len(found) - 1
    assert [len(group) for group in found[:complete]] == groups[:complete]


def test_no_more_batches_are_drawn_than_needed() -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        yield from numbered(3, 3)
        raise AssertionError("one batch too many")

    assert drawn(endless(), 2, 4) == [[0, 1], [2, 3, 4, 5]]


def test_batches_of_different_lengths_stay_pieces() -> None:
    data = [{"ids": torch.zeros(2, 5)}, {"ids": torch.zeros(3, 7)}]
    (group,) = SampleStream(data, 0, None).pieces([4])
    assert [tuple(piece["ids"].shape) for piece in group] == [(2, 5), (2, 7)]
    assert samples_in(group) == 4


def test_samples_are_counted() -> None:
    assert SampleStream(numbered(3, 4), 0, None).count() == 7


def test_following_samples_come_after_the_skipped_ones() -> None:
    stream = SampleStream(numbered(4, 4, 4), 0, None)
    found = stream.following(5, 4, 2, room_bytes=1e9)
    assert [batch[1].tolist() for batch in found] == [[5, 6], [7, 8]]  # across two batches
    assert [len(batch[1]) for batch in stream.following(5, 4, 2, room_bytes=20.0)] == [1]
    assert stream.following(12, 4, 2, room_bytes=1e9) == []


@pytest.mark.parametrize("total", [0, 1, 6, 7])
def test_sizes_add_up(total: int) -> None:
    found = list(sizes(total, 3))
    assert sum(found) == total
    assert all(size == 3 for size in found[:-1])


def test_an_iterator_can_be_drawn_again() -> None:
    stream = SampleStream(iter(numbered(3, 3)), 0, None)
    first = [batch[1].tolist() for (batch,) in stream.pieces([2, 1])]
    whole = [batch[1].tolist() for (batch,) in stream.pieces([3, 3])]
    assert first == [[0, 1], [2]]
    assert whole == [[0, 1, 2], [3, 4, 5]]


def test_interleaved_passes_over_an_iterator_see_the_same_batches() -> None:
    stream = SampleStream(iter(numbered(1, 1, 1, 1)), 0, None)
    one, two = stream.pieces([1] * 4), stream.pieces([1] * 4)
    next(one)
    next(two)
    next(two)
    assert [int(group[0][1]) for group in one] == [1, 2, 3]
    assert [int(group[0][1]) for group in two] == [2, 3]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_pass_over_a_loader_draws_the_same(shuffle: bool) -> None:
    stream = SampleStream(DataLoader(Numbers(), batch_size=4, shuffle=shuffle), 0, None)

    def draw() -> Tensor:
        pieces = [piece for group in stream.pieces([10]) for piece in group]
        return torch.cat([torch.cat([x[:, None], noise], dim=1) for x, noise in pieces])

    first = draw()
    random.random(), np.random.rand(), torch.rand(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(stream.reseeded(1)._batches().__next__()[1], first[:4, 1:])


def test_every_pass_over_an_iterable_dataset_draws_the_same() -> None:
    stream = SampleStream(DataLoader(Stream(), batch_size=4), 0, None)
    first, again = (list(stream.pieces([6])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(first), tensors_in(again), strict=True))


def _loader(place: str, generator: torch.Generator) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(8.0), torch.arange(8))
    sampler = RandomSampler(data, generator=generator)
    if place == "loader":
        return DataLoader(data, batch_size=2, shuffle=True, generator=generator)
    if place == "sampler":
        return DataLoader(data, batch_size=2, sampler=sampler)
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False))


@pytest.mark.parametrize("place", ["loader", "sampler", "batch sampler"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_generator_of_the_loaders_own_is_seeded_and_put_back(place: str, finished: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    stream = SampleStream(_loader(place, generator), 3, None)
    groups = stream.pieces([8 if finished else 2])
    first = next(groups)
    assert torch.equal(generator.get_state(), before)  # also while the pass is going on
    del groups
    assert torch.equal(generator.get_state(), before)
    torch.rand(1, generator=generator)
    again = next(stream.pieces([8 if finished else 2]))
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(first), tensors_in(again), strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_errors_of_the_data_leave_the_generators_alone(error: type[BaseException]) -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 5:
                raise error("from the data")
            return super().__getitem__(index)

    generator = torch.Generator().manual_seed(7)
    states: list[Any] = [generator.get_state(), torch.get_rng_state(), random.getstate()]
    numpy_state: Any = np.random.get_state()
    loader = DataLoader(Broken(), batch_size=2, shuffle=True, generator=generator)
    with pytest.raises(error, match="from the data"):
        drawn(loader, 10)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert random.getstate() == states[2]
    found: Any = np.random.get_state()
    assert np.array_equal(found[1], numpy_state[1])


# Batches


def test_tensors_of_a_nest_are_mapped_in_order() -> None:
    batch = {"a": [torch.ones(2), (torch.zeros(2), "text")], "b": torch.full((2,), 3.0)}
    mapped = map_tensors(batch, lambda tensor: tensor + 1)
    assert mapped["a"][1][1] == "text"
    assert [tensor[0].item() for tensor in tensors_in(mapped)] == [2.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.zeros(4, 2), torch.zeros(4)), 4),
        ([torch.zeros(1, 2), torch.zeros(1)], 1),
        ({"ids": torch.zeros(3, 2), "labels": torch.zeros(3), "name": "x"}, 3),
        (({"ids": torch.zeros(3, 2)}, torch.zeros(3)), 3),
        (((torch.zeros(5), torch.zeros(5, 1)), torch.zeros(5)), 5),
    ],
)
def test_the_size_of_a_batch_is_its_first_dimension(batch: Any, expected: int) -> None:
    assert batch_size(batch) == expected


@pytest.mark.parametrize(
    "batch", [torch.zeros(3), (torch.zeros(3),), (1, 2), {"name": "x"}, None, "text", {}]
)
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="Expected batches to be"):
        batch_size(batch)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((torch.zeros(4, 2), torch.zeros(3)), r"\[3, 4\]"),
        ({"ids": torch.zeros(3, 2), "number": torch.tensor(5)}, r"\[0, 3\]"),
        ((torch.zeros(0, 2), torch.zeros(0)), r"\[0\]"),
    ],
)
def test_tensors_that_disagree_about_the_batch_are_refused(batch: Any, found: str) -> None:
    with pytest.raises(CalibrationError, match=f"first dimensions {found}"):
        batch_size(batch)


def test_mappings_of_any_kind_are_batches() -> None:
    class Encoding(Mapping[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            return {"ids": torch.zeros(2, 3)}[key]

        def __iter__(self) -> Iterator[str]:
            return iter(["ids"])

        def __len__(self) -> int:
            return 1

    assert batch_size(Encoding()) == 2
