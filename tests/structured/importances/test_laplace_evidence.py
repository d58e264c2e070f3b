"""The evidence of a Laplace posterior, for whole units."""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration
from torchprune_bayes._numerics.gaussian_evidence import delta_f_gaussian
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.structured import find_groups, shrink
from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
from torchprune_bayes.structured.importances.laplace_evidence import LaplaceEvidenceImportance
from torchprune_bayes.structured.importances.random import RandomImportance
from torchprune_bayes.structured.slicing import apply_plan, groups_after, plan_of


def model_and_groups() -> tuple[nn.Sequential, list[UnitGroup]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    heads = torch.tensor([[0, 1], [4, 5], [2, 3], [6, 7]])
    return model, [
        UnitGroup(
            "0",
            "channel",
            4,
            (
                UnitSlice("0.weight", 0, torch.arange(4)[:, None], "producer"),
                UnitSlice("0.bias", 0, torch.arange(4)[:, None], "producer"),
                UnitSlice("1.weight", 1, torch.arange(4)[:, None], "consumer"),
            ),
        ),
        UnitGroup(
            "2",
            "head",
            4,
            (
                UnitSlice("2.weight", 0, heads, "producer"),
                UnitSlice("2.bias", 0, heads, "producer"),
                UnitSlice("3.weight", 1, heads, "consumer"),
            ),
        ),
    ]


def posterior_of(model: nn.Sequential) -> Posterior:
    weights = {name: tensor for name, tensor in model.named_parameters() if "weight" in name}
    return Posterior(weights, {name: weight.square() * 5 for name, weight in weights.items()})


def test_the_change_of_a_unit_is_the_sum_over_what_reads_it():
    model, groups = model_and_groups()
    posterior = posterior_of(model)
    importance = LaplaceEvidenceImportance(posterior, tau=0.25)
    for group, reader in zip(groups, ("1.weight", "3.weight"), strict=True):
        changes = delta_f_gaussian(
            posterior.mean[reader], posterior.variance(reader), posterior.prior.values(reader)
        )
        expected = [-float(changes[:, row].sum()) - 0.25 for row in group.slices[-1].positions]
        found = importance.score(group, model)
        assert found is not None
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_units_that_something_unknown_reads_stay():
    model, groups = model_and_groups()
    mean = {"0.weight": model[0].weight}
    importance = LaplaceEvidenceImportance(Posterior(mean, {"0.weight": mean["0.weight"].square()}))
    assert importance.score(groups[0], model) is None
    alone = UnitGroup("0", "channel", 4, groups[0].slices[:2])
    assert LaplaceEvidenceImportance(posterior_of(model)).score(alone, model) is None


def test_scores_follow_a_cut():
    model, groups = model_and_groups()
    importance = LaplaceEvidenceImportance(posterior_of(model))
    before = [importance.score(group, model) for group in groups]
    kept = {"0": torch.tensor([1, 3]), "2": torch.tensor([0, 1, 3])}
    importance.update(model, groups, kept)
    plan = plan_of(model, groups, kept)
    apply_plan(model, plan)
    for group, old in zip(groups_after(groups, plan, kept), before, strict=True):
        found = importance.score(group, model)
        assert found is not None
        assert old is not None
        torch.testing.assert_close(found, old[kept[group.name]])
    whole, groups = model_and_groups()
    importance.prepare(whole, groups)
    fresh = importance.score(groups[0], whole)
    assert fresh is not None
    assert before[0] is not None
    assert torch.equal(fresh, before[0])


def test_a_unit_that_only_noise_reads_goes():
    model, groups = model_and_groups()
    with torch.no_grad():
        model[1].weight[:, 2] = 1e-3
        model[1].weight[:, [0, 1, 3]] = 3.0
    weights = {"1.weight": model[1].weight}
    posterior = Posterior(weights, {"1.weight": torch.full((4, 4), 20.0)})
    found = LaplaceEvidenceImportance(posterior).score(groups[0], model)
    assert found is not None
    assert (found < 0).tolist() == [False, False, True, False]


def test_at_a_sparsity_it_is_better_than_chance():
    x, y, model = trained_on_four_corners()

    def loss_with(importance: Any) -> float:
        small = copy.deepcopy(model)
        given = importance(Calibration(small, [(x, y)], cross_entropy))
        shrink(small, x[:2], given, sparsity=0.5, target="flops", repair="none")
        with torch.no_grad():
            return float(cross_entropy(small(x), y))

    at_random = [loss_with(lambda _, s=seed: RandomImportance(seed=s)) for seed in range(8)]
    assert loss_with(LaplaceEvidenceImportance) < median(at_random)


def trained_on_four_corners() -> tuple[Tensor, Tensor, nn.Module]:
    """Points ``[256, 2]`` around four corners, their classes, and a network of two layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = torch.arange(256) % 4
        x = torch.stack([y // 2, y % 2], 1) * 2.0 - 1.0 + 0.4 * torch.randn(256, 2)
        model = nn.Sequential(
            *(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return x, y, model


class Recurrent(nn.Module):
    """A recurrent layer, whose weights are in no list to prune, in front of a linear one."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.a, self.b = kind(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_states_of_recurrent_layers_are_scored(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(kind), torch.randn(12, 4, 3)
    with torch.no_grad():
        for name, at in (("a.weight_hh_l0", 2), ("b.weight", 2)):
            model.get_parameter(name)[:, at] = 0.0  # nothing reads this one
    groups = find_groups(model, x[:2])
    importance = LaplaceEvidenceImportance(
        Calibration(model, [(x, torch.arange(12) % 2)], cross_entropy)
    )
    importance.prepare(model, groups)
    [group] = [group for group in groups if group.name == "a"]
    scores = importance.score(group, model)
    assert scores is not None
    assert (scores.shape, float(scores[2])) == ((6,), 0.0)
    assert bool((scores[[0, 1, 3, 4, 5]] != 0).all())
