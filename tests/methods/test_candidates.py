"""The line search of a step, on losses that are written down."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchprune_bayes.calibration import Calibration, MeanLoss
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods._candidates import Candidate, climbed

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
ETAS = (0.0, 0.01, 0.02, 0.04, 0.08)


@dataclass
class Losses(Calibration):
    """A calibration whose loss is a function of the two weights."""

    curve: torch.Tensor
    calls: int = field(default=0)

    def held_out_loss(self, weights: dict[str, Tensor] | None = None) -> MeanLoss:  # type: ignore[override]
        assert weights is not None
        self.calls += 1
        scale, eta = weights["w"].tolist()
        return MeanLoss(float(self.curve[SCALES.index(scale), ETAS.index(eta)]), 1, False)


def candidate(scale: float, eta: float) -> Candidate:
    weights = {"w": torch.tensor([scale, eta], dtype=torch.float64)}
    return Candidate({}, weights, {}, "full", 1.0, scale, eta)


@given(
    best=st.tuples(st.floats(-1, 5), st.floats(-1, 5)),
    slopes=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    start=st.tuples(st.sampled_from(SCALES), st.sampled_from(ETAS)),
)
def test_on_parabolas_it_finds_what_the_whole_grid_would(best, slopes, start) -> None:
    places = torch.arange(5.0, dtype=torch.float64)
    rows, columns = (slope * (places - at) ** 2 for slope, at in zip(slopes, best, strict=True))
    losses = Losses(curve=rows[:, None] + columns)
    found = climbed(candidate, (SCALES, ETAS), start, losses)
    assert found.loss == losses.curve.min()
    assert found.weights["w"].tolist() == [found.scale, found.gradient_step]
    assert losses.calls <= 5 + 5 + 4


@given(
    losses=st.lists(st.floats(0, 1), min_size=25, max_size=25),
    start=st.tuples(st.sampled_from(SCALES), st.sampled_from(ETAS)),
)
def test_on_any_losses_it_is_no_worse_than_the_start_and_the_smallest_move(losses, start) -> None:
    curve = torch.tensor(losses, dtype=torch.float64).reshape(5, 5)
    found = climbed(candidate, (SCALES, ETAS), start, Losses(curve=curve))
    first = curve[SCALES.index(start[0]), ETAS.index(start[1])]
    assert found.loss is not None
    assert found.loss <= min(curve[0, 0], first)


def test_a_loss_that_is_not_a_number_loses() -> None:
    curve = torch.full((5, 5), torch.nan, dtype=torch.float64)
    curve[4, 3] = 1.0
    found = climbed(candidate, (SCALES, ETAS), (1.0, 0.08), Losses(curve=curve))
    assert (found.scale, found.gradient_step) == (1.0, 0.04)


def test_a_single_candidate_is_not_measured() -> None:
    assert climbed(candidate, ((1.0,), (0.0,)), (1.0, 0.0), None).loss is None


def test_a_choice_needs_data() -> None:
    with pytest.raises(ArgumentError, match="choosing them needs `calibration=`"):
        climbed(candidate, (SCALES, (0.0,)), (1.0, 0.0), None)
