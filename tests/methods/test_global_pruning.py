"""Applying decisions, and the helpers around a pruned model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from tests.contracts.cases import (
    batches,
    calibration_of,
    live_count,
    masks_by_place,
    mlp,
    options_of,
    pairs,
)
from tests.contracts.state import unchanged
from tests.damage import flipped, truncated
from torchprune_bayes import (
    Decision,
    Magnitude,
    WoodFisher,
    bake,
    detach_views,
    export_masks,
    import_masks,
    masks_of,
    prunable_parameters,
    prune_global,
    registered_methods,
)
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    ParameterError,
    TorchPruneBayesError,
)
from torchprune_bayes.methods import apply_decision
from torchprune_bayes.params import ParameterSpace


def pruned_mlp(amount: float = 0.5) -> nn.Sequential:
    model = mlp()
    prune_global(pairs(model), Magnitude, amount=amount)
    return model


@pytest.mark.parametrize("method", ["magnitude", Magnitude])
def test_a_method_is_a_class_or_a_name(method):
    model = mlp()
    decision = prune_global(pairs(model), method, amount=0.4)
    assert list(decision.masks) == ["params[0].weight", "params[1].weight"]  # no model is known
    assert all(map(torch.equal, decision.masks.values(), masks_by_place(model)))


@pytest.mark.parametrize("name", registered_methods())
def test_every_method_names_tensors_as_the_model_does(name):
    if name == "bmrs":
        pytest.skip("prunes gates, not lists of parameters")
    model, other = mlp(), mlp()
    listed = prunable_parameters(model)
    decision = prune_global(listed, name, amount=0.4, **options_of(name, model, listed))
    assert list(decision.masks) == ["0.weight", "2.weight"]
    if not registered_methods()[name].needs_calibration:
        decision = prune_global(other, name, amount=0.4)
        assert list(decision.masks) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("name", registered_methods())
def test_a_layer_replaced_after_the_calibration_is_refused(name):
    if name == "bmrs":
        pytest.skip("prunes gates, not lists of parameters")
    model = mlp()
    listed = prunable_parameters(model)
    options = options_of(name, model, listed)
    model[0] = nn.Linear(6, 5)
    with unchanged(model), pytest.raises(AlignmentError, match="again"):
        prune_global(listed, name, amount=0.4, **options)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        (Magnitude(0.5), "Expected a BasePruningMethod class"),
        (nn.Linear, "Expected a BasePruningMethod class"),
        (prune.LnStructured, "of type 'structured'"),
        (prune.CustomFromMask, "of type 'global'"),
        (prune.BasePruningMethod, "of type None"),
    ],
)
def test_other_things_than_unstructured_methods_are_refused(method, error):
    model = mlp()
    with unchanged(model), pytest.raises(ArgumentTypeError, match=error):
        prune_global(pairs(model), method, amount=0.5)


def test_an_unknown_name_is_answered_with_the_names():
    with pytest.raises(ArgumentError, match=r"magnitude.*got 'magnitud'"):
        prune_global(pairs(mlp()), "magnitud", amount=0.5)


@pytest.mark.parametrize("method", [prune.L1Unstructured, prune.RandomUnstructured])
def test_the_hosts_methods_work_too(method):
    model, reference = mlp(), mlp()
    for amount in (0.3, 5):
        torch.manual_seed(0)
        prune_global(pairs(model), method, amount=amount)
        torch.manual_seed(0)
        prune.global_unstructured(pairs(reference), method, amount=amount)
    assert all(map(torch.equal, masks_by_place(model), masks_by_place(reference)))


def test_mixed_precision_models():
    model = mlp()
    model[2].bfloat16()
    prune_global(pairs(model), Magnitude, amount=0.5)
    assert [module.weight_mask.dtype for module, _ in pairs(model)] == [
        torch.float32,
        torch.bfloat16,
    ]
    assert live_count(model) == 23


def test_the_order_of_calibrated_parameters_does_not_matter():
    first, second = mlp(), mlp()
    prune_global(pairs(first), WoodFisher, amount=0.5, calibration=calibration_of(first))
    prune_global(pairs(second)[::-1], WoodFisher, amount=0.5, calibration=calibration_of(second))
    assert all(map(torch.equal, masks_by_place(first), masks_by_place(second)))


def test_pruning_again_reuses_mask_and_hook():
    model = pruned_mlp()
    hooks = [list(module._forward_pre_hooks.values()) for module, _ in pairs(model)]
    masks = [module.weight_mask for module, _ in pairs(model)]
    prune_global(pairs(model), Magnitude, amount=0.5)
    assert [list(module._forward_pre_hooks.values()) for module, _ in pairs(model)] == hooks
    assert [id(module.weight_mask) for module, _ in pairs(model)] == list(map(id, masks))
    assert torch.equal(model[0].weight, model[0].weight_orig * model[0].weight_mask)


def test_pruning_after_the_hosts_own():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.2)
    prune.random_unstructured(model[0], "weight", 0.2)
    first = model[0].weight_mask != 0
    prune_global(pairs(model), Magnitude, amount=0.5)
    assert not ((model[0].weight_mask != 0) & ~first).any()
    assert isinstance(next(iter(model[0]._forward_pre_hooks.values())), prune.PruningContainer)
    x, _ = batches()[0]
    expected = model(x)
    assert torch.equal(bake(model)(x), expected)


def test_decisions_with_updates_are_written():
    model = mlp()
    space = ParameterSpace(model, [pairs(model)[0]])
    mask = torch.rand(5, 6) > 0.5
    parameter, new = model[0].weight, torch.where(mask, 7.0, 0.0)
    apply_decision(space, Decision({"0.weight": mask}, {"0.weight": new}))
    assert model[0].weight_orig is parameter
    assert torch.equal(model[0].weight, new)


@pytest.mark.parametrize(
    ("update", "error"),
    [
        (torch.full((5, 6), float("nan")), "to be finite, got 30 NaN"),
        (torch.zeros(6, 5), "got torch.float32 of shape"),
        (None, "Expected a tensor of shape .* got none"),
    ],
)
def test_impossible_updates_are_refused(update, error):
    model = mlp()
    space = ParameterSpace(model, [pairs(model)[0]])
    updates = {} if update is None else {"0.weight": update}
    with unchanged(model), pytest.raises(ArgumentError, match=error):
        apply_decision(space, Decision({"0.weight": torch.ones(5, 6).bool()}, updates))


def test_places_outside_the_space_are_refused():
    model = mlp()
    space = ParameterSpace(model, [pairs(model)[0]])
    decision = Decision({"0.weight": torch.ones(5, 6).bool()})
    with unchanged(model), pytest.raises(AlignmentError):
        apply_decision(space, decision, pairs(model))


def test_a_mask_without_its_hook_is_refused():
    model = pruned_mlp()
    model[2]._forward_pre_hooks.clear()
    with unchanged(model), pytest.raises(ParameterError, match="got a mask without one"):
        prune_global(pairs(model), Magnitude, amount=0.5)


def test_bake_finishes_several_tensors_of_a_module():
    model = mlp()
    prune_global([*pairs(model), (model[0], "bias")], Magnitude, amount=0.3)
    prune_global([(model[0], "bias")], Magnitude, amount=0.5)
    x, _ = batches()[0]
    expected = model(x)
    assert bake(model) is model
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert not prune.is_pruned(model)
    assert all(isinstance(module.weight, nn.Parameter) for module, _ in pairs(model))


def test_bake_leaves_a_dense_model_alone():
    model = mlp()
    with unchanged(model):
        bake(model)


def test_bake_takes_drifted_entries_out():
    model = pruned_mlp()
    with torch.no_grad():
        model[0].weight_orig.add_(1.0)
    mask = model[0].weight_mask != 0
    assert torch.equal(bake(model)[0].weight != 0, mask)


def test_detach_views_keeps_values_and_training():
    model = pruned_mlp()
    x, y = batches()[0]
    model(x)
    views = [module.weight for module, _ in pairs(model)]
    assert detach_views(model) is model
    for (module, _), view in zip(pairs(model), views, strict=True):
        assert torch.equal(module.weight, view)
        assert module.weight.is_leaf
    twin = copy.deepcopy(model)
    for each in (model, twin):
        cross_entropy(each(x), y).backward()
    assert torch.equal(model[0].weight_orig.grad, twin[0].weight_orig.grad)
    dense = mlp()
    with unchanged(dense):
        detach_views(dense)


def test_masks_of_nested_and_single_modules():
    assert masks_of(mlp()) == {}
    model = nn.Sequential(pruned_mlp(), nn.Linear(3, 3))
    assert list(masks_of(model)) == ["0.0.weight", "0.2.weight"]
    found = masks_of(model[0][0])
    assert found["weight"].dtype == torch.bool
    assert torch.equal(found["weight"], model[0][0].weight_mask != 0)


def test_masks_survive_a_file(tmp_path):
    model, other = pruned_mlp(), mlp()
    export_masks(model, tmp_path / "masks.safetensors")
    assert (tmp_path / "masks.safetensors").stat().st_size < 45 + 300
    found = import_masks(other, str(tmp_path / "masks.safetensors"))
    assert all(torch.equal(mask, masks_of(model)[name]) for name, mask in found.items())
    x, _ = batches()[0]
    assert torch.equal(other(x), model(x))


def test_imported_masks_add_to_those_there(tmp_path):
    model, other = pruned_mlp(), mlp()
    export_masks(model, tmp_path / "masks")
    prune_global(pairs(other), prune.RandomUnstructured, amount=0.5)
    there = masks_of(other)
    found = import_masks(other, tmp_path / "masks")
    for name, mask in masks_of(other).items():
        assert torch.equal(mask, there[name] & masks_of(model)[name])
        assert torch.equal(mask, found[name])


def test_masks_go_between_wrapped_and_plain_models(tmp_path):
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    export_masks(pruned_mlp(), tmp_path / "masks")
    import_masks(compiled, tmp_path / "masks")
    assert live_count(model) == 23
    export_masks(compiled, tmp_path / "again")
    assert list(import_masks(mlp(), tmp_path / "again")) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("content", [b"", b"no masks", None])
def test_files_that_hold_no_masks_are_one_sentence(tmp_path, content):
    model = pruned_mlp()
    export_masks(model, tmp_path / "masks")
    whole = (tmp_path / "masks").read_bytes()
    (tmp_path / "masks").write_bytes(whole[:-3] if content is None else content)
    fresh = mlp()
    with unchanged(fresh), pytest.raises(ArgumentError, match=r"Expected masks in .*masks, got"):
        import_masks(fresh, tmp_path / "masks")
    with unchanged(fresh), pytest.raises(ArgumentError, match="got no such file"):
        import_masks(fresh, tmp_path / "none")
    with pytest.raises(ArgumentError, match="Expected to write"):
        export_masks(model, tmp_path / "none" / "masks")


def test_masks_of_tied_tensors_survive_a_file(tmp_path):
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    prune_global(pairs(model), Magnitude, amount=0.5)
    export_masks(model, tmp_path / "masks")
    import_masks(other, tmp_path / "masks")
    assert masks_of(other).keys() == masks_of(model).keys() == {"0.weight", "1.weight"}
    assert torch.equal(other[1].weight_mask, model[0].weight_mask)


def test_a_dense_model_has_no_masks_to_export(tmp_path):
    with pytest.raises(ArgumentError, match="got none pruned"):
        export_masks(mlp(), tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"1.weight": torch.ones(2, 2).bool()}, AlignmentError, "got none"),
        ({"9.weight": torch.ones(2, 2).bool()}, AlignmentError, "got none"),
        ({"2.weight": torch.ones(5, 3).bool()}, AlignmentError, r"got one of shape \(3, 5\)"),
        ({"2.weight": torch.ones(3, 5)}, ArgumentTypeError, "got torch.float32"),
    ],
)
def test_files_that_do_not_fit_are_refused(masks, error, message, tmp_path):
    save_file({"0.weight": torch.zeros(5, 6).bool(), **masks}, tmp_path / "masks")
    model = mlp()
    with unchanged(model), pytest.raises(error, match=message):
        import_masks(model, tmp_path / "masks")


@settings(max_examples=40)
@given(st.data())
def test_damaged_masks_are_refused_in_a_sentence_or_are_masks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    prune_global(prunable_parameters(model), "magnitude", amount=0.5)
    export_masks(model, path)
    content = path.read_bytes()
    path.write_bytes(data.draw(st.one_of(flipped(content), truncated(content))))
    fresh = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: (id(p), p.tolist()) for name, p in fresh.named_parameters()}
    try:
        import_masks(fresh, path)
    except TorchPruneBayesError:
        assert {n: (id(p), p.tolist()) for n, p in fresh.named_parameters()} == before
        assert not masks_of(fresh)
