"""The line search of a step, on losses that are written down, and what is measured before it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchprune_bayes import Calibration, EmpiricalFisher, WoodFisher
from torchprune_bayes.calibration import MeanLoss
from torchprune_bayes.errors import ArgumentError, CalibrationWarning
from torchprune_bayes.methods import _obs_step, _tuning, find_method
from torchprune_bayes.methods._moves import Move, best_by_coordinates
from torchprune_bayes.methods._obs_step import StepReport, prune_step
from torchprune_bayes.methods._tuning import Tuning

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
ETAS = (0.0, 0.01, 0.02, 0.04, 0.08)


@dataclass
class Losses:
    """Held-out samples whose loss is a function of the lengths of the two moves."""

    curve: Tensor
    calls: int = field(default=0)

    def held_out_loss(self, weights: dict[str, Tensor]) -> MeanLoss:
        self.calls += 1
        scale, eta = weights["w"].tolist()
        return MeanLoss(float(self.curve[SCALES.index(scale), ETAS.index(eta)]), 1, False)


@dataclass
class Step:
    held_out: Any
    last: StepReport | None = None


@dataclass
class Pruned:
    step: Step
    losses: dict[tuple[float, float], MeanLoss] = field(default_factory=dict)

    def weights(self, scale: float, gradient_step: float) -> dict[str, Tensor]:
        return {"w": torch.tensor([scale, gradient_step], dtype=torch.float64)}


def search(losses: Any, start: tuple[float, float], axes: Any = (SCALES, ETAS)) -> Move:
    pruned: Any = Pruned(Step(losses))
    return best_by_coordinates(lambda scale, eta: Move(pruned, scale, eta), axes, start)


@given(
    best=st.tuples(st.floats(-1, 5), st.floats(-1, 5)),
    slopes=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    start=st.tuples(st.sampled_from(SCALES), st.sampled_from(ETAS)),
)
def test_on_parabolas_it_finds_what_the_whole_grid_would(best, slopes, start) -> None:
    places = torch.arange(5.0, dtype=torch.float64)
    rows, columns = (slope * (places - at) ** 2 for slope, at in zip(slopes, best, strict=True))
    losses = Losses(curve=rows[:, None] + columns)
    found = search(losses, start)
    assert found.loss == losses.curve.min()
    assert found.weights["w"].tolist() == [found.scale, found.gradient_step]
    assert losses.calls <= 5 + 5 + 4


@given(
    losses=st.lists(st.floats(0, 1), min_size=25, max_size=25),
    start=st.tuples(st.sampled_from(SCALES), st.sampled_from(ETAS)),
)
def test_on_any_losses_it_is_no_worse_than_the_start(losses, start) -> None:
    curve = torch.tensor(losses, dtype=torch.float64).reshape(5, 5)
    found = search(Losses(curve=curve), start)
    assert found.loss is not None
    assert found.loss <= curve[SCALES.index(start[0]), ETAS.index(start[1])]


def test_a_loss_that_is_not_a_number_loses() -> None:
    curve = torch.full((5, 5), torch.nan, dtype=torch.float64)
    curve[4, 3] = 1.0
    found = search(Losses(curve=curve), (1.0, 0.08))
    assert (found.scale, found.gradient_step) == (1.0, 0.04)


def test_a_single_move_is_not_measured() -> None:
    assert search(None, (1.0, 0.0), ((1.0,), (0.0,))).loss is None


def test_a_choice_needs_data() -> None:
    with pytest.raises(ArgumentError, match="choosing them needs `calibration=`"):
        search(None, (1.0, 0.0), (SCALES, (0.0,)))


@dataclass
class Counted:
    """Batches, and how many samples were drawn from them."""

    batches: list[tuple[Tensor, Tensor]]
    drawn: int = 0

    def __iter__(self):
        for batch in self.batches:
            self.drawn += len(batch[0])
            yield batch


@pytest.mark.parametrize("memory_mb", [0.02, 1024.0])
@pytest.mark.parametrize("method", ["woodfisher", "woodtaylor", "cbs", "greedy-obs"])
def test_a_step_takes_one_pass_over_the_data_whatever_the_budget(method, memory_mb) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 3))
    batches = [(torch.randn(16, 12), torch.randint(3, (16,))) for _ in range(8)]
    data = Counted(batches)
    calibration = Calibration(
        model, data, nn.functional.cross_entropy, num_samples=64, memory_mb=memory_mb
    )
    passes = 0
    plain = calibration.gradients

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        return plain(*args, **options)

    calibration.gradients = counting  # type: ignore[method-assign]
    kind: Any = find_method(method).method
    decision = kind(0.5, calibration=calibration).decide(calibration.space)
    assert passes == 1
    assert len(decision.info["steps"]) == 1


def test_results_do_not_depend_on_the_budget() -> None:
    def masks(**options: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 3)).double()
        x, y = torch.randn(128, 12, dtype=torch.float64), torch.randint(3, (128,))
        calibration = Calibration(
            model, [(x, y)], nn.functional.cross_entropy, num_samples=64, **options
        )
        decision = WoodFisher(0.6, calibration=calibration).decide(calibration.space)
        return torch.cat([mask.flatten() for mask in decision.masks.values()])

    assert torch.equal(masks(memory_mb=1024.0), masks(memory_mb=0.05))


def test_left_out_errors_are_those_of_leaving_out() -> None:
    """Against ridge regression solved anew without each sample, by blocks and in both forms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    calibration = Calibration(model, [(x, y)], nn.functional.cross_entropy)
    for size in ("full", "tensor", 9):
        fisher = EmpiricalFisher(block_size=size).fit(calibration)
        gradients = fisher.store.whole()
        weights = torch.randn(gradients.shape[1], dtype=torch.float64)
        keep = torch.rand(gradients.shape[1]) < 0.4
        dampings = [1e-3, 1e-1, 10.0]
        found = fisher.held_out_errors(weights, keep, dampings)
        for index, damping in enumerate(dampings):
            predicted = torch.zeros(20, dtype=torch.float64)
            for start, stop in fisher.blocks:
                part = gradients[:, start:stop]
                kept = part[:, keep[start:stop]]
                change = part @ torch.where(keep, 0.0, weights)[start:stop]
                for sample in range(20):
                    others = torch.arange(20) != sample
                    ridge = kept[others].T @ kept[others] + 20 * damping * torch.eye(kept.shape[1])
                    move = torch.linalg.solve(ridge, kept[others].T @ change[others])
                    predicted[sample] += kept[sample] @ move
            total = gradients @ torch.where(keep, 0.0, weights)
            scale = ((total @ predicted) / (predicted @ predicted)).clamp(0, 1)
            rise = 0.5 * (total - scale * predicted).square().mean()
            torch.testing.assert_close(found[index], rise, rtol=1e-6, atol=1e-12)


def _little() -> Calibration:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    x, y = torch.randn(16, 12, dtype=torch.float64), torch.randint(3, (16,))
    return Calibration(model, [(x, y)], nn.functional.cross_entropy, num_samples=8)


def test_a_few_blocks_are_blocks_of_the_whole() -> None:
    fisher = EmpiricalFisher(block_size=7).fit(_little())
    few = fisher.few_blocks(0.5)
    chosen = fisher.blocks[:: -(-len(fisher.blocks) // 16)]
    assert len(few.blocks) == len(chosen) <= 16
    assert [b - a for a, b in few.blocks] == [b - a for a, b in chosen]
    columns = torch.cat([fisher.store.read(*block) for block in chosen], dim=1)
    assert torch.equal(few.store.whole(), columns)
    assert few.damping == 0.5


@pytest.mark.parametrize("block_size", ["full", 7])
def test_the_unit_of_the_damping_takes_no_gram_matrix(block_size) -> None:
    fisher = EmpiricalFisher(block_size=block_size).fit(_little())
    unit = fisher.mean_square()
    assert not fisher.products.spaces
    assert unit == pytest.approx(float(fisher.store.whole().double().square().mean()), rel=1e-12)
    fisher.inverse_diagonal()
    assert fisher.mean_square() == pytest.approx(unit, rel=1e-12)


def test_the_same_blocks_share_their_products() -> None:
    fisher = EmpiricalFisher().fit(_little())
    fisher.inverse_diagonal()
    assert fisher.with_blocks("full").products is fisher.products
    assert not fisher.with_blocks(7).products.spaces


@pytest.mark.parametrize("method", ["woodfisher", "woodtaylor"])
def test_every_step_goes_on_from_the_last_one(method, monkeypatch: pytest.MonkeyPatch) -> None:
    """The left-out gradients are looked at in the first step alone."""
    calls = []
    plain = _tuning._least_left_out_error

    def counting(*arguments: Any) -> int:
        calls.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(_tuning, "_least_left_out_error", counting)
    calibration = _little()
    kind: Any = find_method(method).method
    found = kind(0.7, calibration=calibration, steps=5, block_size="full")
    steps = found.decide(calibration.space).info["steps"]
    assert len(calls) == 1
    assert all(step["mean_square"] > 0 for step in steps)
    ratios = [step["damping"] / step["mean_square"] for step in steps]
    powers = [math.log(b / a, 3.0) for a, b in pairwise(ratios)]
    least, most = _tuning.RELATIVE_DAMPINGS[0], _tuning.RELATIVE_DAMPINGS[-1]
    for power, ratio in zip(powers, ratios[1:], strict=True):
        assert power == pytest.approx(round(power), abs=1e-6) or (
            ratio == pytest.approx(least) or ratio == pytest.approx(most)
        )


def test_small_blocks_are_tried_with_one_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "_SMALL_BLOCKS", (10, 10))
    tried: list[tuple[int | str, float]] = []
    plain = prune_step

    def noting(step: Any, damping: float, procedure: Any) -> Any:
        tried.append((step.fisher.block_size, damping))
        return plain(step, damping, procedure)

    monkeypatch.setattr(_tuning, "prune_step", noting)
    calibration = _little()
    WoodFisher(0.7, calibration=calibration).decide(calibration.space)
    assert [size for size, _ in tried].count(16) == 1
    assert len({damping for size, damping in tried if size == "full"}) > 1


def test_a_large_network_has_small_blocks_and_no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The damping is that of the smallest left-out error, and only lengths are tried."""
    monkeypatch.setattr(_obs_step, "_MOST_FOR_TRIALS", 100)
    monkeypatch.setattr(_tuning, "_SMALL_BLOCKS", (10, 10))
    calibration, measured = _little(), []
    plain = calibration.held_out_loss

    def counting(weights: Any = None) -> MeanLoss:
        measured.append(weights)
        return plain(weights)

    monkeypatch.setattr(calibration, "held_out_loss", counting)
    step = WoodFisher(0.7, calibration=calibration).decide(calibration.space).info["steps"][0]
    assert step["block_size"] == 16  # twice the gradients
    assert len(measured) <= len(_tuning.SCALES) + 1  # and one at the start, to warn of a rise
    fisher = EmpiricalFisher(block_size=16).fit(calibration)
    unit = fisher.mean_square()
    weights = fisher.remaining.gather(calibration.space.values())
    middle = fisher.damped(unit)
    scores = weights.square() / middle.inverse_diagonal()
    few = fisher.few_blocks(unit)
    inside = few.remaining.gather(fisher.remaining.scatter(scores))
    keep = torch.ones(len(inside), dtype=torch.bool)
    keep[inside.argsort()[: round(0.7 * len(inside))]] = False
    dampings = [unit * factor for factor in _tuning.RELATIVE_DAMPINGS]
    errors = few.held_out_errors(few.remaining.gather(calibration.space.values()), keep, dampings)
    chosen = next(d for d, e in zip(dampings, errors, strict=True) if e <= 1.05 * errors.min())
    assert step["damping"] == pytest.approx(chosen, rel=1e-9)


def test_a_model_that_pruning_destroys_is_warned_of() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(20 * torch.eye(8))
    x = torch.eye(8).repeat(8, 1)
    calibration = Calibration(
        model, [(x, x.argmax(1))], lambda out, y: 9 * nn.functional.cross_entropy(out, y)
    )
    method = WoodFisher(0.99, calibration=calibration)
    with pytest.warns(CalibrationWarning, match="raised the held-out loss from"):
        method.decide(calibration.space)


def test_a_step_without_any_move_does_not_stop_the_next() -> None:
    """Where all moves do harm a step only prunes; the next one searches from the whole move."""
    report = StepReport(0.5, "full", 1.0, 1.0, 0.0, 0.0, 1.0, False)
    losses = Losses(curve=torch.arange(25.0).reshape(5, 5))
    pruned: Any = Pruned(Step(losses, report))
    tuning = Tuning("auto", (1.0,), ETAS)
    found = tuning._best_lengths(pruned)
    assert (found.scale, found.gradient_step) == (0.0, 0.0)


@dataclass
class Walked:
    """The start of a second step; pruned with a damping, its losses are those in ``curves``."""

    curves: dict[float, Tensor]
    last: StepReport
    index: int = 1
    damping_unit: float = 1.0
    tried: list[float] = field(default_factory=list)

    def with_blocks(self, block_size: Any) -> Walked:
        assert block_size == "full"
        return self

    def pruned(self, damping: float) -> Pruned:
        self.tried.append(damping)
        return Pruned(Step(Losses(self.curves[damping]), self.last))


def _walk(monkeypatch: pytest.MonkeyPatch, scale: float, curves: dict[float, Tensor]) -> Any:
    """The move of a second step, from a damping of 1, and the dampings that were tried."""
    monkeypatch.setattr(_tuning, "prune_step", lambda step, damping, _: step.pruned(damping))
    step: Any = Walked(curves, StepReport(0.5, "full", 1.0, 1.0, scale, 0.0, 1.0, False))
    move = Tuning("auto", (1.0,), ETAS)._from_last(step, step.last, _NO_PROCEDURE)
    return move, step.tried


_NO_PROCEDURE: Any = None
_HARM = torch.arange(1.0, 26.0).reshape(5, 5)  # the smallest loss is that of no move at all


def _good(scale: int, eta: int, loss: float) -> Tensor:
    curve = torch.full((5, 5), 100.0)
    curve[0, 0] = 5.0
    curve[scale, : eta + 1] = torch.linspace(loss + 1, loss, eta + 1)
    return curve


def test_a_step_after_one_without_a_move_finds_its_lengths_again(monkeypatch) -> None:
    """Its lengths, a scale of 0 here, are none of the candidates."""
    move, tried = _walk(monkeypatch, 0.0, {1.0: _good(4, 2, 1.0), 3.0: _good(4, 2, 2.0)})
    assert tried == [1.0, 3.0]
    assert (move.scale, move.gradient_step, move.loss) == (1.0, ETAS[2], 1.0)


def test_a_walk_goes_on_from_a_damping_without_a_move(monkeypatch) -> None:
    """No move is best at the first damping, and at the next one pruning alone does better."""
    curves = {1.0: _HARM, 3.0: _HARM - 0.5, 9.0: _HARM}
    curves[3.0][4, 1] = 0.25  # and a move does better still
    move, tried = _walk(monkeypatch, 1.0, curves)
    assert tried == [1.0, 3.0, 9.0]
    assert (move.scale, move.gradient_step, move.loss) == (1.0, ETAS[1], 0.25)


def test_a_walk_keeps_the_lengths_of_the_last_damping(monkeypatch) -> None:
    curves = {1.0: _good(4, 1, 3.0), 3.0: _good(4, 1, 2.0), 9.0: _good(4, 1, 4.0)}
    move, tried = _walk(monkeypatch, 1.0, curves)
    assert tried == [1.0, 3.0, 9.0]
    assert (move.scale, move.gradient_step, move.loss) == (1.0, ETAS[1], 2.0)
    assert move.pruned.step.held_out.calls <= 5
