"""Joint OBS costs of coupled units and the update of what stays, against formed inverses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from tests.references.fisher import damped_fisher, joint_update
from tests.references.node_sensitivity import (
    GatedFlat,
    GatedResidual,
    entries_of,
    joint_obs_cost,
    sample_gradients,
)
from tests.structured.models import build, images, unsettled
from torchprune_bayes import Calibration
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.structured import UnitGroup, find_groups, shrink
from torchprune_bayes.structured.importances.woodfisher import WoodFisherImportance

DAMPING = 1e-2


def small(samples: int) -> tuple[nn.Module, Tensor, Tensor, list[UnitGroup]]:
    model = unsettled(GatedResidual(4, 3)).double().eval()
    x = images(samples, 5).double()
    return model, x, torch.arange(samples) % 3, find_groups(model, x[:1])


def calibrated(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Calibration:
    return Calibration(model, [(x, y)], cross_entropy, **options)


def names_of(groups: list[UnitGroup], model: nn.Module) -> list[str]:
    owned = {piece.name for group in groups for piece in group.slices}
    return [name for name, _ in model.named_parameters() if name in owned]


def flat(tensors: dict[str, Tensor], names: list[str], lead: int = 0) -> Tensor:
    return torch.cat([tensors[name].flatten(lead) for name in names], dim=-1)


def blocks_for(kind: int | str, model: nn.Module, names: list[str]) -> list[slice]:
    """Ranges of the vector of all tensors, by definition of each kind of block."""
    sizes = [model.get_parameter(name).numel() for name in names]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if kind == "full":
        return [slice(0, sum(sizes))]
    if kind == "tensor":
        return [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    assert isinstance(kind, int)
    cuts = [range(a, a + n, kind) for a, n in zip(starts, sizes, strict=True)]
    ends = [a + n for a, n in zip(starts, sizes, strict=True)]
    return [slice(b, min(b + kind, end)) for cut, end in zip(cuts, ends, strict=True) for b in cut]


@pytest.mark.parametrize("samples", [6, 70])
@pytest.mark.parametrize("kind", ["full", "tensor", 16])
def test_costs_are_those_of_formed_inverses(kind, samples):
    # 6 samples: fewer than a unit has entries; 70: more than most blocks have.
    model, x, y, groups = small(samples)
    names = names_of(groups, model)
    rows = flat(sample_gradients(model, cross_entropy, x, y), names, 1)
    weights = flat({n: p.detach() for n, p in model.named_parameters()}, names)
    importance = WoodFisherImportance(
        calibrated(model, x, y), block_size=kind, damping=DAMPING, update_scale=0.0
    )
    importance.prepare(model, groups)
    for group in groups:
        found = importance.score(group, model)
        for unit in range(group.units):
            masks = entries_of(group, unit, model)
            empty = {n: torch.zeros_like(model.get_parameter(n)).bool() for n in names}
            pruned = flat(empty | masks, names)
            expected = sum(
                joint_obs_cost(damped_fisher(rows[:, b], DAMPING), weights[b], pruned[b])
                for b in blocks_for(kind, model, names)
                if pruned[b].any()
            )
            assert float(found[unit]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("damping", [DAMPING, "auto"])
def test_one_units_own_entries_have_the_cost_of_their_block_alone(damping):
    model, x, y, groups = small(11)
    names = names_of(groups, model)
    rows = flat(sample_gradients(model, cross_entropy, x, y), names, 1)
    weights = flat({n: p.detach() for n, p in model.named_parameters()}, names)
    value = float(rows.square().mean()) if damping == "auto" else damping
    importance = WoodFisherImportance(calibrated(model, x, y), block_size="unit", damping=damping)
    importance.prepare(model, groups)
    for group in groups:
        found = importance.score(group, model)
        for unit in range(group.units):
            empty = {n: torch.zeros_like(model.get_parameter(n)).bool() for n in names}
            own = flat(empty | entries_of(group, unit, model), names)
            fisher = damped_fisher(rows[:, own], value)
            expected = float(0.5 * weights[own] @ fisher @ weights[own])
            assert float(found[unit]) == pytest.approx(expected, rel=1e-9)
    assert importance.update(model, groups, {groups[0].name: torch.tensor([0])}) is None


def test_a_unit_whose_row_and_column_cross_owns_the_crossing_once():
    model, _, _, groups = small(9)
    (stem,) = (group for group in groups if group.name == "stem")
    shared = [piece for piece in stem.slices if piece.name == "conv3.weight"]
    assert {piece.dim for piece in shared} == {0, 1}, "the case that is meant"
    masks = entries_of(stem, 0, model)
    assert int(masks["conv3.weight"].sum()) == 4 + 4 - 1


def test_what_stays_takes_the_joint_update():
    model, x, y, groups = small(8)
    names = names_of(groups, model)
    rows = flat(sample_gradients(model, cross_entropy, x, y), names, 1)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights = flat(values, names)
    kept = {groups[0].name: torch.tensor([0, 2, 3]), groups[1].name: torch.tensor([1])}
    keep = torch.ones_like(weights, dtype=torch.bool)
    for group in groups:
        for unit in set(range(group.units)) - set(kept[group.name].tolist()):
            empty = {n: torch.zeros_like(values[n]).bool() for n in names}
            keep &= ~flat(empty | entries_of(group, unit, model), names)
    importance = WoodFisherImportance(
        calibrated(model, x, y), block_size="full", damping=DAMPING, update_scale=1.0
    )
    importance.prepare(model, groups)
    found = importance.update(model, groups, kept)
    expected = weights + joint_update(rows, DAMPING, weights, keep, step=0.0)
    assert found is not None
    torch.testing.assert_close(flat(found, names), expected * keep, rtol=1e-7, atol=1e-9)
    assert not torch.equal(expected[keep], weights[keep])


def test_streamed_gradients_give_the_same_scores_and_update():
    model, x, y, groups = small(8)
    kept = {groups[0].name: torch.tensor([0, 2, 3]), groups[1].name: torch.tensor([1])}
    results = []
    for memory_mb in (64.0, 0.02):
        importance = WoodFisherImportance(
            calibrated(model, x, y, memory_mb=memory_mb), block_size="tensor", update_scale=0.5
        )
        importance.prepare(model, groups)
        assert importance._fisher.store.rows.is_shared() == (memory_mb < 1)
        scores = [importance.score(group, model) for group in groups]
        results.append((scores, importance.update(model, groups, kept)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_help_from_more_weights_lowers_the_cost():
    model, x, y, groups = small(9)
    costs = []
    for kind in ("full", "tensor", "unit"):
        importance = WoodFisherImportance(calibrated(model, x, y), block_size=kind, damping=DAMPING)
        importance.prepare(model, groups)
        costs.append(torch.cat([importance.score(group, model) for group in groups]))
    full, tensor, alone = costs
    assert bool((full <= alone * (1 + 1e-9)).all())
    assert bool((full > 0).all())
    assert bool((tensor > 0).all())


def test_the_update_lowers_the_loss_after_shrinking():
    model = unsettled(GatedFlat()).double().eval()
    x = images(96, 5).double()
    y = (x[:, 0].mean((1, 2)) > 0).long() + (x[:, 1].mean((1, 2)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    losses = {}
    for scale in (0.0, "auto"):
        twin = copy.deepcopy(model)
        importance = WoodFisherImportance(
            calibrated(twin, x, y), block_size="full", damping=1e-3, update_scale=scale
        )
        report = shrink(
            twin,
            x[:2],
            importance,
            sparsity=0.4,
            target="channels",
            repair="none" if scale == 0.0 else "auto",
        )
        assert report.units.after == 6
        assert report.repairs == []
        losses[scale] = float(cross_entropy(twin(x), y).detach())
    assert losses["auto"] < losses[0.0]


@pytest.mark.parametrize("kind", ["auto", "unit"])
def test_nothing_changes_and_frozen_layers_count(kind):
    model, inputs = build("resnet"), images(6)
    model[0].weight.requires_grad_(False)
    model[1].train()
    groups = find_groups(model, inputs[:1])
    calibration = calibrated(model, inputs, torch.arange(6) % 5, mini_batch=2)
    importance = WoodFisherImportance(calibration, block_size=kind)
    with unchanged(model):
        importance.prepare(model, groups)
        scores = [importance.score(group, model) for group in groups]
        importance.update(model, groups, {groups[0].name: torch.arange(2)})
    assert all(bool((score > 0).all()) for score in scores)


def test_several_steps_and_the_pruners_of_the_host():
    model, inputs = build("vgg"), images(8)
    calibration = calibrated(model, inputs, torch.arange(8) % 5)
    report = shrink(model, inputs[:2], WoodFisherImportance(calibration), sparsity=0.5, steps=2)
    assert report.steps == 2
    assert report.parameters.sparsity >= 0.5
    tp = pytest.importorskip("torch_pruning")
    model = build("resnet")
    calibration = calibrated(model, inputs, torch.arange(8) % 5)
    pruner = tp.pruner.BasePruner(
        model, (inputs[:1],), importance=WoodFisherImportance(calibration), pruning_ratio=0.5
    )
    pruner.step()
    assert model(inputs).shape == (8, 5)
    assert model[0].out_channels == 4


def test_bad_input():
    model, x, y, _ = small(4)
    calibration = calibrated(model, x, y)
    for wrong in ({"block_size": 0}, {"block_size": "layer"}, {"damping": -1.0}):
        with pytest.raises(ArgumentError):
            WoodFisherImportance(calibration, **wrong)
    with pytest.raises(ArgumentError, match="update_scale"):
        WoodFisherImportance(calibration, update_scale=2.0)
    with pytest.raises(ArgumentTypeError):
        WoodFisherImportance([(x, y)])
