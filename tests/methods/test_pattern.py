from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from tests.contracts.state import unchanged
from tests.methods.pattern_cases import all_groups, calibration_of, mixed, places
from torchprune_bayes import Calibration, prune_global
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.methods import (
    CBS,
    GreedyOBS,
    PaperVariant,
    PostUpdateCBS,
    WoodFisher,
    WoodTaylor,
)
from torchprune_bayes.methods._pattern import Pattern
from torchprune_bayes.methods.cbs import INITIALS
from torchprune_bayes.schedules import linear, one_shot
from torchprune_bayes.training import GradualPruner

METHODS = [WoodFisher, WoodTaylor, GreedyOBS, CBS, PostUpdateCBS]
WITH_BLOCKS = [WoodFisher, WoodTaylor, GreedyOBS, CBS]
FULL = {"block_size": "full", "damping": 0.01}


def options_of(method):
    # A given damping, because to choose one takes six times as long.
    return {"damping": 0.01} | ({"perturbations": 4} if issubclass(method, CBS) else {})


def decide(method, model=None, **options):
    calibration = calibration_of(mixed() if model is None else model)
    found = method(calibration=calibration, **options_of(method) | options)
    return calibration, found.decide(calibration.space)


def inverse_of(calibration, damping):
    """The dense inverse and, for each group, its places in the row-major vector."""
    rows = torch.cat(list(calibration.gradients())).double()
    fisher = rows.mT @ rows / len(rows) + damping * torch.eye(rows.shape[1]).double()
    numbers = torch.arange(rows.shape[1]).split([mask.numel() for mask in masks_of(calibration)])
    shaped = [n.reshape(mask.shape) for n, mask in zip(numbers, masks_of(calibration), strict=True)]
    return fisher.inverse(), all_groups(dict(zip(calibration.space.names, shaped, strict=True)))


def masks_of(calibration):
    return list(calibration.space.masks().values())


def cost(inverse, flat, chosen):
    chosen = torch.as_tensor(chosen)
    w = flat[chosen].double()
    return float(w @ inverse[chosen][:, chosen].inverse() @ w) / 2


def flat_of(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"scope": "layer", "block_size": "tensor"}, {"steps": 3}])
def test_every_group_keeps_two_of_four(method, options):
    _, decision = decide(method, pattern="2:4", **options)
    assert (all_groups(decision.masks).sum(-1) == 2).all()
    updated = {name: value != 0 for name, value in decision.updates.items()}
    assert not (flat_of(updated) & ~flat_of(decision.masks)).any()


@pytest.mark.parametrize("method", WITH_BLOCKS)
@pytest.mark.parametrize("options", [{}, {"scope": "layer", "block_size": "tensor"}, {"steps": 3}])
def test_groups_go_whole_and_exactly_as_many_as_asked(method, options):
    _, decision = decide(method, amount=0.5, pattern="1x4", **options)
    kept = all_groups(decision.masks).sum(-1)
    assert set(kept.tolist()) == {0, 4}
    assert int((kept == 0).sum()) == 15  # of 30
    updated = {name: value != 0 for name, value in decision.updates.items()}
    assert not (flat_of(updated) & ~flat_of(decision.masks)).any()


@pytest.mark.parametrize("initial", INITIALS)
@pytest.mark.parametrize("method", [CBS, PostUpdateCBS])
def test_every_start_of_a_search_has_the_pattern(initial, method):
    for iterations in (0, 100):
        _, decision = decide(method, pattern="1:4", initial=initial, max_iterations=iterations)
        assert (all_groups(decision.masks).sum(-1) == 1).all()


@pytest.mark.parametrize("initial", INITIALS)
@pytest.mark.parametrize("pattern", [{"pattern": "2:4"}, {"pattern": "1x4", "amount": 0.5}])
def test_a_search_within_a_pattern_never_ends_at_a_larger_training_loss(initial, pattern):
    losses = []
    for iterations in (0, 100):
        calibration, decision = decide(
            CBS, initial=initial, update="none", max_iterations=iterations, **FULL, **pattern
        )
        kept = {name: v * decision.masks[name] for name, v in calibration.space.values().items()}
        losses.append(calibration.held_out_loss(kept).value)
    assert losses[1] <= losses[0]


@pytest.mark.parametrize("pattern", [{"pattern": "2:4"}, {"pattern": "1x4", "amount": 0.5}])
def test_swaps_within_a_pattern_lower_the_quadratic_model(pattern):
    found = []
    for iterations in (0, 100):
        calibration = calibration_of(mixed())
        method = CBS(
            calibration=calibration,
            initial="magnitude",
            update="none",
            max_iterations=iterations,
            **FULL,
            **pattern,
        )
        # Judged by the model alone, which is what the swaps lower.
        fisher = EmpiricalFisher(**FULL).fit(calibration)
        values = calibration.space.values()

        def rise(stage, keep, fisher=fisher, values=values):
            masks = stage.step.fisher.remaining.scatter(keep)
            return fisher.quadratic(
                fisher.remaining.gather({n: v * ~masks[n] for n, v in values.items()})
            )

        method._training_loss = rise
        masks = method.decide(calibration.space).masks
        removed = {name: value * ~masks[name] for name, value in values.items()}
        found.append(fisher.quadratic(fisher.remaining.gather(removed)))
    assert found[1] < found[0]


def test_the_cheapest_two_of_every_four_go_whatever_the_layer():
    calibration, decision = decide(WoodFisher, pattern="2:4", stages=1, update="none", **FULL)
    inverse, groups = inverse_of(calibration, 0.01)
    flat, kept = flat_of(calibration.space.values()), flat_of(decision.masks)
    for group in groups:
        gone = group[~kept[group]].tolist()
        least = min(cost(inverse, flat, way) for way in combinations(group.tolist(), 2))
        assert cost(inverse, flat, gone) <= least * (1 + 1e-5)


def test_the_cheapest_groups_go_whatever_the_layer():
    calibration, decision = decide(
        WoodFisher, amount=40, pattern="1x4", stages=1, update="none", **FULL
    )
    inverse, groups = inverse_of(calibration, 0.01)
    flat, kept = flat_of(calibration.space.values()), flat_of(decision.masks)
    costs = torch.tensor([cost(inverse, flat, group) for group in groups])
    whole = kept[groups].all(-1)
    assert int((~whole).sum()) == 10
    assert costs[~whole].max() < costs[whole].min()


def test_greedy_groups_are_removed_as_by_a_loop_over_dense_inverses():
    options = {"pattern": "1x4", "amount": 40, **FULL}
    calibration, decision = decide(GreedyOBS, **options)
    inverse, groups = inverse_of(calibration, 0.01)
    flat, gone = flat_of(calibration.space.values()), []
    for _ in range(10):
        left = [i for i in range(len(groups)) if i not in gone]
        total = [cost(inverse, flat, groups[[*gone, i]].flatten()) for i in left]
        gone.append(left[int(torch.tensor(total).argmin())])
    kept = flat_of(decision.masks)[groups].all(-1)
    assert sorted(gone) == (~kept).nonzero().flatten().tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "3:4"])
def test_what_is_pruned_already_counts_and_stays(method, pattern):
    model = mixed()
    with torch.no_grad():
        model[3].weight[:, 1] = 0.0  # remaining all the same
    for module, name in places(model):
        prune.random_unstructured(module, name, 0.3)
    before = all_groups(calibration_of(model).space.masks())
    _, decision = decide(method, model, pattern=pattern)
    kept = all_groups(decision.masks)
    assert torch.equal(kept.sum(-1), before.sum(-1).clamp_max(int(pattern[0])))
    assert not (kept & ~before).any()


@pytest.mark.parametrize("method", METHODS)
def test_the_doors_of_the_host_give_the_same_pattern(method):
    masks = []
    for door in ("global", "ours"):
        model = mixed()
        options = {"calibration": calibration_of(model), "pattern": "2:4", **options_of(method)}
        if door == "global":
            prune.global_unstructured(places(model), method, **options)
        else:
            prune_global(places(model), method, amount=0.5, **options)
        masks.append(torch.cat([module.weight_mask.flatten() for module, _ in places(model)]))
    assert torch.equal(*masks)
    model = mixed()
    options = {"calibration": calibration_of(model), "pattern": "2:4", **options_of(method)}
    method.apply(model[1], "weight", **options)
    assert (model[1].weight_mask.T.unflatten(1, (2, 4)).sum(-1) == 2).all()
    assert not prune.is_pruned(model[3])


def test_several_steps_grow_the_pattern_on_the_path():
    _, decision = decide(WoodFisher, pattern="2:4", steps=4, path="linear")
    found = [step["sparsity"] for step in decision.info["steps"]]
    assert found == pytest.approx([0.125, 0.25, 0.375, 0.5], abs=0.01)


def test_a_pattern_is_reached_by_a_gradual_pruner():
    model = mixed()
    calibration = calibration_of(model)
    pruner = GradualPruner(
        None, WoodFisher, one_shot(0.5, at=1), calibration=calibration, pattern="2:4"
    )
    pruner.step()
    assert (all_groups(pruner.masks).sum(-1) == 2).all()


@pytest.mark.parametrize("block_size", ["auto", "tensor", 10, 3])
def test_streamed_gradients_give_the_same_pattern(block_size):
    found = []
    for memory_mb in (64.0, 0.001):
        calibration = calibration_of(mixed(), memory_mb=memory_mb)
        options = {"damping": 0.01, "stages": 1, "update": "none", "block_size": block_size}
        if block_size == "auto" and memory_mb > 1:
            options["block_size"] = 4
        method = WoodFisher(calibration=calibration, pattern="2:4", **options)
        found.append(method.decide(calibration.space).masks)
    assert (all_groups(found[1]).sum(-1) == 2).all()
    assert block_size == "auto" or torch.equal(flat_of(found[0]), flat_of(found[1]))


@pytest.mark.parametrize("text", ["2-4", "4:4", "0:4", "2:4:8", "1x1", "2x4", "", None, 24])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ArgumentError, match="`pattern` like '2:4' or '1x4'"):
        Pattern.parse(text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pattern": "2:4", "amount": 0.6}, ArgumentError, "amount=0.5, or none, .* 2:4, got 0.6"),
        ({"pattern": "2:4", "amount": 7}, ArgumentError, "amount=60, or none, .* got 7"),
        ({"pattern": "1x4", "amount": 7}, ArgumentError, "a multiple of 4 entries for `amount`"),
        ({"pattern": "1x4"}, ArgumentError, "either `amount` or `flops_target`"),
        ({"pattern": "2:3"}, ParameterError, "a multiple of 3 inputs in `0.0.weight`"),
        (
            {"pattern": "2:4", "compat": PaperVariant(flops_power=1.0)},
            ArgumentError,
            "no `flops_power` with a pattern",
        ),
        ({"pattern": "2:4", "flops_target": 0.5}, ArgumentError, "no `flops_target` with"),
        ({"pattern": "2:4", "compat": "paper"}, ArgumentError, "no `compat` with a pattern"),
        ({"pattern": "2:4", "curvature": EmpiricalFisher()}, ArgumentError, "no `curvature` with"),
    ],
)
def test_what_does_not_go_with_a_pattern_is_refused(options, error, message):
    model = mixed()
    calibration = calibration_of(model)
    with unchanged(model), pytest.raises(error, match=message):
        prune_global(None, WoodFisher, calibration=calibration, **options)


def test_whole_groups_are_swapped_by_the_paper_s_objective_alone():
    with pytest.raises(ArgumentError, match="objective with a pattern of whole groups"):
        PostUpdateCBS(0.5, pattern="1x4", calibration=calibration_of(mixed()))


def test_biases_have_no_inputs():
    layer = nn.Linear(4, 4)
    data = [(torch.randn(8, 4), torch.randint(4, (8,)))]
    calibration = Calibration(layer, data, cross_entropy, params=[(layer, "bias")])
    with pytest.raises(ParameterError, match="inputs in `bias`"):
        WoodFisher(calibration=calibration, pattern="2:4").decide(calibration.space)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_schedule_prunes_whole_groups(scope):
    calibration = calibration_of(mixed())
    schedule = linear(0.5, 0, 3)
    pruner = GradualPruner(
        None,
        WoodFisher,
        schedule,
        calibration=calibration,
        pattern="1x4",
        scope=scope,
        **options_of(WoodFisher),
    )
    for step in range(1, 4):
        pruner.step()
        kept = all_groups(pruner.masks).sum(-1)
        assert set(kept.tolist()) == {0, 4}
        groups = [mask.numel() // 4 for mask in masks_of(calibration)]
        parts = groups if scope == "layer" else [sum(groups)]
        assert int((kept == 0).sum()) == sum(round(schedule(step) * part) for part in parts)
    assert pruner.finished
