"""Costs of many weights at once against formed inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.references.fisher import damped_fisher, joint_update
from tests.references.node_sensitivity import joint_obs_cost
from torchprune_bayes._numerics.joint_cost import JointCosts, sums_of_units

INDICES = torch.arange(24).reshape(4, 6)
VALID = torch.ones(4, 6, dtype=torch.bool)
VALID[2, 3:] = False


def block(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(samples, 24, dtype=torch.float64, generator=generator)
    return gradients, torch.randn(24, dtype=torch.float64, generator=generator)


def pruned(unit: int) -> Tensor:
    mask = torch.zeros(24, dtype=torch.bool)
    mask[INDICES[unit][VALID[unit]]] = True
    return mask


@pytest.mark.parametrize("samples", [3, 9, 40])
def test_all_forms_are_those_of_formed_inverses(samples):
    # Fewer gradients than a unit has entries, more than that, and more than the block has.
    gradients, weights = block(samples)
    found = JointCosts(gradients, 0.1, weights).of(INDICES, VALID)
    fisher = damped_fisher(gradients, 0.1)
    expected = [joint_obs_cost(fisher, weights, pruned(unit)) for unit in range(4)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 30), st.floats(1e-4, 10.0), st.integers(0, 50))
def test_the_cost_is_the_quadratic_at_the_best_answer(samples, damping, seed):
    gradients, weights = block(samples, seed)
    found = JointCosts(gradients, damping, weights).of(INDICES, VALID)
    fisher = damped_fisher(gradients, damping)
    for unit in range(4):
        move = joint_update(gradients, damping, weights, ~pruned(unit), step=0.0)
        assert float(found[unit]) == pytest.approx(float(0.5 * move @ fisher @ move), rel=1e-6)


@pytest.mark.parametrize("samples", [3, 40])
def test_units_in_small_pieces_cost_the_same(samples):
    gradients, weights = block(samples)
    whole = JointCosts(gradients, 0.1, weights).of(INDICES, VALID)
    pieces = JointCosts(gradients, 0.1, weights, memory_bytes=1.0).of(INDICES, VALID)
    torch.testing.assert_close(pieces, whole)


def test_no_units_cost_nothing():
    gradients, weights = block(3)
    none = torch.zeros(0, 1, dtype=torch.long)
    assert JointCosts(gradients, 0.1, weights).of(none, none.bool()).shape == (0,)


@pytest.mark.parametrize("shape", [(6,), (6, 6), (6, 6, 2)])
def test_sums_count_every_entry_of_a_unit_once(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, *shape, generator=generator)
    rows = torch.tensor([[0, 4], [1, 2], [5, 3]])
    columns = torch.tensor([[3], [1], [0]])
    owned = [(0, rows), (1, columns)] if len(shape) > 1 else [(0, rows)]
    found = sums_of_units(values, owned)
    for unit in range(3):
        mask = torch.zeros(shape, dtype=torch.bool)
        for dim, positions in owned:
            for position in positions[unit].tolist():
                mask.select(dim, position).fill_(True)
        torch.testing.assert_close(found[:, unit], values[:, mask].double().sum(1))
