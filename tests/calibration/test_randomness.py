import random
from typing import Any

import numpy as np
import pytest
import torch

from torchprune_bayes.calibration.randomness import IsolatedRandomness


def numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def interrupted() -> None:
    numbers()
    raise KeyboardInterrupt


def states() -> tuple[bytes, object, bytes]:
    numpy_state: Any = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy_state[1].tobytes()


def test_the_callers_generators_do_not_notice() -> None:
    before = states()
    randomness = IsolatedRandomness(5)
    assert states() == before
    with randomness:
        numbers()
    assert states() == before
    with pytest.raises(KeyboardInterrupt), randomness:
        interrupted()
    assert states() == before


def test_the_private_state_goes_on_where_it_was_left() -> None:
    with IsolatedRandomness(5):
        expected = [numbers(), numbers()]
    randomness = IsolatedRandomness(5)
    found = []
    for _ in range(2):
        with randomness:
            found.append(numbers())
        numbers()  # the caller's, in between
    assert found == expected
    assert found[0] != found[1]


def test_other_seeds_give_other_numbers() -> None:
    found = []
    for seed in (0, 1, 2**40):  # NumPy takes 32 bits
        with IsolatedRandomness(seed):
            found.append(numbers())
    assert len(set(found)) == 3


def test_one_can_run_inside_another() -> None:
    outer, inner = IsolatedRandomness(1), IsolatedRandomness(2)
    with IsolatedRandomness(1):
        expected = [numbers(), numbers()]
    with outer:
        found = [numbers()]
        with inner:
            numbers()
        found.append(numbers())
    assert found == expected


def test_further_generators_are_seeded_and_put_back() -> None:
    generator = torch.Generator().manual_seed(9)
    before = generator.get_state()
    randomness = IsolatedRandomness(5, generators=[generator])
    with randomness:
        first = torch.rand(2, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(5)))


def test_a_seed_out_of_range_changes_nothing() -> None:
    before = states()
    with pytest.raises((RuntimeError, ValueError), match="verflow"):
        IsolatedRandomness(2**64)
    assert states() == before
