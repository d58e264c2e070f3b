"""Which samples each draw takes: shuffled anew, or going on in data that keep their order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchprune_bayes import Calibration, prune_global
from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.calibration import _samples as module
from torchprune_bayes.calibration.request import GradientRequest
from torchprune_bayes.errors import ArgumentTypeError, CalibrationError
from torchprune_bayes.seeds import derived_seed

SAMPLES = 60


def numbered(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """Samples that say their number."""
    numbers = torch.arange(samples).float()
    return torch.stack([numbers, numbers.cos(), numbers.sin()], dim=1), torch.arange(samples) % 3


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(*numbered(), strict=True)


class Shuffling:
    """Batches in an order that torch's generator makes."""

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(SAMPLES)
        inputs, labels = numbered()
        return zip(inputs[order].split(7), labels[order].split(7), strict=True)


def lists() -> Any:
    inputs, labels = numbered()
    return list(zip(inputs.split(7), labels.split(7), strict=True))


KEEPING_ORDER = {
    "list": lists,
    "iterator": lambda: iter(lists()),
    "loader": lambda: DataLoader(TensorDataset(*numbered()), batch_size=7),
    "stream": lambda: DataLoader(Stream(), batch_size=7),
    "one batch": lambda: [numbered()],
}
SHUFFLING = {
    "loader": lambda: DataLoader(TensorDataset(*numbered()), batch_size=7, shuffle=True),
    "generator": lambda: DataLoader(
        TensorDataset(*numbered()), batch_size=7, shuffle=True, generator=torch.Generator()
    ),
    "own": Shuffling,
}


def calibration_on(data: Any, num_samples: int | str | None = 10, **options: Any) -> Calibration:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    return Calibration(model, data, cross_entropy, num_samples=num_samples, **options)


def numbers_of(calibration: Calibration) -> list[int]:
    return [int(x) for inputs, _ in calibration.batches(4) for x in inputs[:, 0]]


@pytest.mark.parametrize("data", KEEPING_ORDER.values(), ids=KEEPING_ORDER)
def test_data_in_a_fixed_order_are_gone_on_in(data: Any) -> None:
    calibration = calibration_on(data())
    draws = [numbers_of(calibration.redrawn(index)) for index in range(5)]
    assert draws[0] == list(range(10))
    assert [draw[0] for draw in draws] == [0, 20, 30, 40, 50]  # 10 to 19 are held out
    assert all(draw == list(range(draw[0], draw[0] + 10)) for draw in draws)
    assert numbers_of(calibration.redrawn(5)) == draws[0]  # from the start again
    assert numbers_of(calibration.redrawn(2)) == draws[2]


@pytest.mark.parametrize("data", SHUFFLING.values(), ids=SHUFFLING)
def test_data_that_shuffle_are_drawn_under_another_seed(data: Any) -> None:
    calibration = calibration_on(data())
    draws = [numbers_of(calibration.redrawn(index)) for index in range(4)]
    assert len({tuple(draw) for draw in draws}) == 4
    assert numbers_of(calibration.reseeded(derived_seed(0, 2))) == draws[2]


def test_the_former_name_of_a_further_draw_still_works() -> None:
    calibration = calibration_on(
        [(torch.arange(30.0)[:, None].expand(-1, 3), torch.arange(30) % 3)]
    )
    with pytest.warns(DeprecationWarning, match="now `redrawn`"):
        former = calibration.fresh(1)
    assert numbers_of(former) == numbers_of(calibration.redrawn(1))


@given(
    samples=st.integers(1, 25),
    num_samples=st.integers(1, 25),
    index=st.integers(0, 8),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_later_draws_never_take_held_out_samples(
    samples: int, num_samples: int, index: int, batches: list[int]
) -> None:
    inputs, labels = numbered(samples)
    cuts = (batches * samples)[:samples]
    data, start = [], 0
    for size in cuts:
        data.append((inputs[start : start + size], labels[start : start + size]))
        start += size
    calibration = calibration_on([pair for pair in data if len(pair[0])], num_samples)
    if samples < num_samples:
        with pytest.raises(CalibrationError, match=f"Expected {num_samples} calibration samples"):
            numbers_of(calibration.redrawn(index))
        return
    held_out = range(num_samples, min(2 * num_samples, samples))
    ring = [number for number in range(samples) if number not in held_out]
    expected = [ring[(index * num_samples + k) % len(ring)] for k in range(num_samples)]
    assert numbers_of(calibration.redrawn(index)) == expected


def test_late_draws_pass_over_no_whole_rounds_once_their_length_is_known() -> None:
    drawn = [0]

    class Counted:
        def __iter__(self) -> Iterator[Any]:
            for inputs, labels in lists():
                drawn[0] += len(labels)
                yield inputs, labels

    calibration = calibration_on(Counted())
    expected = numbers_of(calibration.redrawn(3))
    for index in (3, 3 + 5, 3 + 5 * 100):
        drawn[0] = 0
        assert numbers_of(calibration.redrawn(index)) == expected
        if index > 8:
            assert drawn[0] <= SAMPLES


def test_draws_of_draws_go_on_too() -> None:
    calibration = calibration_on(lists())
    later = calibration.redrawn(1)
    assert numbers_of(later.redrawn(0)) == numbers_of(later) == list(range(20, 30))
    assert numbers_of(later.redrawn(1)) == list(range(30, 40))


def test_held_out_samples_are_the_same_for_all_draws_in_a_fixed_order() -> None:
    calibration = calibration_on(lists())
    inputs, labels = numbered()
    model = calibration.model
    expected = cross_entropy(model(inputs[10:20]), labels[10:20]).detach()
    for index in range(4):
        found = calibration.redrawn(index).held_out_loss()
        assert (found.samples, found.in_sample) == (10, False)
        assert found.value == pytest.approx(float(expected), rel=1e-5)


def test_steps_take_other_samples_from_data_that_do_not_shuffle() -> None:
    seen: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.extend(target.tolist())
        return cross_entropy(output, target % 3)

    inputs, _ = numbered()
    data = [(inputs / SAMPLES, torch.arange(SAMPLES))]
    calibration = calibration_on(data, 10, vectorize=False).with_loss(loss)
    prune_global(None, "woodtaylor", amount=0.6, calibration=calibration, steps=3)
    assert set(range(40)) <= set(seen)


# How many


def test_the_default_is_a_sensible_number_of_gradients(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DEFAULT_GRADIENTS", 12)
    drawn = [0]

    def counted() -> Iterator[Any]:
        for batch in lists():
            drawn[0] += len(batch[0])
            yield batch

    with caplog.at_level(logging.INFO, logger="torchprune_bayes"):
        calibration = calibration_on(counted(), None)
        assert calibration.num_samples == calibration.num_gradients == 12
    assert drawn[0] <= 14  # and not all of the data, only to count them
    assert [r.message for r in caplog.records] == [
        "Gradients of 12 samples; num_samples='all' takes all."
    ]
    assert calibration_on(lists(), None, mini_batch=3).num_gradients == 12
    assert calibration_on(lists(), None, mini_batch=7).num_samples == 56
    assert calibration_on(lists(), "all").num_samples == SAMPLES
    assert calibration_on(lists(), "all", mini_batch=7).num_gradients == 8
    assert calibration_on(lists(), np.int64(20)).num_samples == 20
    with pytest.raises(ArgumentTypeError, match="`num_samples` to be an int"):
        calibration_on(lists(), "most")


def test_the_model_is_taken_to_be_trained_on_all_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEFAULT_GRADIENTS", 12)
    for data in (lists(), KEEPING_ORDER["loader"](), KEEPING_ORDER["stream"]()):
        calibration = calibration_on(data, None)
        assert (calibration.num_samples, calibration.num_data) == (12, SAMPLES)
    assert calibration_on(lists(), 20).num_data == 20
    assert calibration_on(lists(), "all").num_data == SAMPLES


def test_seeds_of_neighbours_share_no_draw() -> None:
    loader = SHUFFLING["loader"]()
    draws = [
        tuple(numbers_of(calibration_on(loader, seed=seed).redrawn(index)))
        for seed in range(4)
        for index in range(4)
    ]
    assert len(set(draws)) == len(draws)
    labels = [
        tuple(y.item() for _, part in c.fisher_batches() for y in part)
        for c in (calibration_on(lists(), 40, seed=s, fisher="true") for s in range(4))
    ]
    assert len(set(labels)) == len(labels)


@given(groups=st.integers(1, 7), size=st.integers(1, 9), skipped=st.integers(0, 40))
def test_a_pass_from_a_later_gradient_on_is_the_end_of_the_whole_one(
    groups: int, size: int, skipped: int
) -> None:
    calibration = calibration_on(lists(), 2 * groups, mini_batch=2, memory_mb=1e-3 * size)
    remaining = RemainingVector(calibration.space.masks())
    request = GradientRequest(None, remaining, (0, remaining.numel))
    first = min(skipped, groups)
    whole = torch.cat(list(calibration.gradient_rows(request)))
    rest = list(calibration.gradient_rows(request.after(first)))
    torch.testing.assert_close(torch.cat([whole[:first], *rest]), whole)


def test_shares_divide_the_default_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEFAULT_GRADIENTS", 8)
    shares = [calibration_on(lists(), None, mini_batch=2).share(i, 3) for i in range(3)]
    assert [share.num_samples for share in shares] == [6, 6, 4]
    assert calibration_on(lists(), "all").share(0, 3).num_samples == SAMPLES


def test_held_out_batches_are_as_large_as_a_cache_allows() -> None:
    sizes = []

    def counted(output: Tensor, target: Tensor) -> Tensor:
        sizes.append(len(output))
        return cross_entropy(output, target)

    data = [numbered(600)]
    unknown = calibration_on(data, 300, check_deterministic=False).with_loss(counted)
    expected = unknown.held_out_loss().value
    assert sizes == [128, 128, 44]
    known = calibration_on(data, 300, check_deterministic=False).with_loss(counted)
    list(known.gradients())  # after which it is known what a sample takes
    sizes.clear()
    assert known.held_out_loss().value == pytest.approx(expected, rel=1e-6)
    assert sizes == [300]
