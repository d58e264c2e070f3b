"""Sensitivities in two processes: the sums over all samples of one, before any absolute value."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tests.integrations.accelerate_cases import batches, taken_in_turns
from tests.integrations.processes import accelerator, in_two_processes, load_all, save_from
from torchprune_bayes import Calibration
from torchprune_bayes.integrations.accelerate import calibrate, check_same_masks, shrink_distributed
from torchprune_bayes.methods import FORCE, SNIP, GraSP, IterativeSNIP, SNIPit
from torchprune_bayes.structured import SNAPitImportance, find_groups, halving_path, shrink

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "snip": (SNIP, {}),
    "snip-it": (SNIPit, {"steps": 2}),
    "iterative-snip": (IterativeSNIP, {"steps": 3}),
    "force": (FORCE, {"steps": 3}),
    "grasp": (GraSP, {"temperature": 1.0}),
}
NORMS = ("running", "batch")
GATES = ("consumer", "producer", "activation")


def untrained() -> nn.Sequential:
    """Two hidden layers with batch norms that have seen no data, float64."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).double()


def data() -> list[tuple[Tensor, Tensor]]:
    """Seven batches of four samples, 16 samples for the first process and 12 for the second."""
    return [(x.double(), y) for x, y in batches(7)]


def shuffled() -> DataLoader[Any]:
    """The same samples, in another order each time they are drawn."""
    x, y = (torch.cat(column) for column in zip(*data(), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)


def decisions(calibration: Calibration) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Scores and masks of all methods, by method and what batch norms normalise by."""
    found = {}
    for name, (method, options) in METHODS.items():
        for norm in NORMS:
            made = method(0.7, calibration=calibration, batch_norm=norm, **options)
            decision = made.decide(calibration.space)
            assert decision.scores is not None
            found[f"{name}, {norm}"] = (decision.scores, decision.masks)
    return found


def unit_scores(calibration: Calibration) -> dict[str, dict[str, Tensor]]:
    """Scores of units, by gate and what batch norms normalise by."""
    model, found = calibration.model, {}
    groups = find_groups(model, data()[0][0])
    for gate, norm in [*((gate, "running") for gate in GATES), ("consumer", "batch")]:
        importance = SNAPitImportance(calibration, gate, norm)
        importance.prepare(model, groups)
        scores = {group.name: importance.score(group, model) for group in groups}
        found[f"{gate}, {norm}"] = {n: score for n, score in scores.items() if score is not None}
    return found


def _scores(path: Path) -> None:
    acc = accelerator()
    calibration = calibrate(acc, untrained(), data(), cross_entropy)
    drawn = calibrate(acc, untrained(), shuffled(), cross_entropy)
    made = decisions(calibration)
    for _, masks in made.values():
        check_same_masks(masks)
    steps = SNIPit(0.95, calibration=drawn).decide(drawn.space)
    found = {"weights": made, "units": unit_scores(calibration)}
    save_from(acc.process_index, found | {"shuffled": (steps.scores, steps.masks)}, path)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    path = tmp_path_factory.mktemp("ranks") / "found"
    in_two_processes(_scores, path)
    return load_all(path)


@cache
def union() -> Calibration:
    """One process with the samples of both."""
    return Calibration(untrained(), taken_in_turns(data()), cross_entropy)


def test_weights_are_scored_and_pruned_as_by_one_process_on_the_union(
    ranks: list[dict[str, Any]],
) -> None:
    for key, (scores, masks) in decisions(union()).items():
        for found in ranks:
            torch.testing.assert_close(found["weights"][key][0], scores, rtol=1e-9, atol=1e-12)
            assert all(torch.equal(found["weights"][key][1][n], m) for n, m in masks.items()), key


def test_absolute_values_are_taken_after_the_sum_over_processes(
    ranks: list[dict[str, Any]],
) -> None:
    # What each process would find alone, averaged by its samples, gives other scores and masks.
    model = untrained()
    gradients = [
        Calibration(model, data()[rank::2], cross_entropy).mean_gradient() for rank in range(2)
    ]
    scores = ranks[0]["weights"]["snip, running"][0]
    wrong, right = [], []
    for name, score in scores.items():
        shares = [model.get_parameter(name).detach() * g[name] for g in gradients]
        assert (shares[0] * shares[1] < 0).any(), "no signs to lose"
        wrong.append((16 * shares[0].abs() + 12 * shares[1].abs()).flatten() / 28)
        right.append((16 * shares[0] + 12 * shares[1]).abs().flatten() / 28)
        assert score.shape == shares[0].shape
    found = torch.cat([score.flatten() for score in scores.values()])
    torch.testing.assert_close(found, torch.cat(right) / torch.cat(right).sum())
    kept = [set(v.topk(60).indices.tolist()) for v in (found, torch.cat(wrong))]
    assert kept[0] != kept[1]


def test_fresh_draws_of_each_step_are_shared_out_without_repeats(
    ranks: list[dict[str, Any]],
) -> None:
    calibration = Calibration(untrained(), shuffled(), cross_entropy)
    decision = SNIPit(0.95, calibration=calibration).decide(calibration.space)
    for found in ranks:
        scores, masks = found["shuffled"]
        torch.testing.assert_close(scores, decision.scores, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(masks[name], mask) for name, mask in decision.masks.items())


def test_units_are_scored_as_by_one_process_on_the_union(ranks: list[dict[str, Any]]) -> None:
    expected = unit_scores(union())
    assert [len(scores) for scores in expected.values()] == [2, 2, 2, 2]
    for key, scores in expected.items():
        for found in ranks:
            torch.testing.assert_close(found["units"][key], scores, rtol=1e-9, atol=1e-12)


def _shrunk(path: Path) -> None:
    acc = accelerator()
    model: Any = untrained()
    calibration = calibrate(acc, model, data(), cross_entropy)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model, _, report = shrink_distributed(
        acc,
        model,
        data()[0][0],
        SNAPitImportance(calibration),
        optimizer=optimizer,
        sparsity=0.8,
        target="channels",
        steps=halving_path(0.8),
        repair="none",
    )
    save_from(acc.process_index, (acc.unwrap_model(model).state_dict(), report.units.after), path)


def test_units_are_cut_in_steps_as_by_one_process_on_the_union(tmp_path: Path) -> None:
    in_two_processes(_shrunk, tmp_path / "found")
    model = untrained().eval()
    calibration = Calibration(model, taken_in_turns(data()), cross_entropy)
    path = halving_path(0.8)
    importance = SNAPitImportance(calibration)
    # A repair predicts one half of the samples from the other, and these are in another order here.
    options: dict[str, Any] = {"target": "channels", "steps": path, "repair": "none"}
    shrink(model, data()[0][0], importance, sparsity=0.8, **options)
    expected = model.state_dict()
    for state, units in load_all(tmp_path / "found"):
        assert units == 4
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
