"""SparseGPT, ALPS and Wanda beside their papers' formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.curvature.test_layer_inputs import Experts, Twice, gpt2
from tests.methods.test_layerwise import calibrated, mlp
from tests.references.layer_update import sparse_gpt
from torchprune_bayes import prune_global
from torchprune_bayes._numerics.layer_update import damped
from torchprune_bayes.curvature.layer_inputs import LayerInputs
from torchprune_bayes.errors import ArgumentError, CalibrationWarning

NAMES = ["alps", "sparsegpt", "wanda"]


def test_sparsegpt_is_the_papers_in_every_layer():
    model, data = mlp()
    calibration = calibrated(model, data)
    dense = {name: value.clone() for name, value in calibration.space.values().items()}
    prune_global(None, "sparsegpt", amount=0.5, calibration=calibration, block_size=4)
    for name, moment in LayerInputs(calibration).moments().items():
        gram = damped(moment.mean[0], 0.01)
        expected = sparse_gpt(gram, dense[name], 0.5, block=4)
        found = model.get_submodule(name.removesuffix(".weight")).weight
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("compare", ["output", "layer"])
def test_wanda_keeps_the_largest_products(compare):
    model, data = mlp()
    calibration = calibrated(model, data)
    dense = model[0].weight.detach().clone()
    decision = prune_global(None, "wanda", amount=0.5, calibration=calibration, compare=compare)
    scores = dense.abs() * data[0][0].norm(dim=0)
    mask = decision.masks["0.weight"]
    if compare == "output":
        expected = scores >= scores.sort(dim=1).values[:, 4:5]
    else:
        expected = scores >= scores.flatten().sort().values[48]
    assert torch.equal(mask, expected)
    assert torch.equal(model[0].weight, dense * mask)
    assert decision.updates is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("4:8", 4)])
def test_patterns_along_the_inputs(name, pattern, kept):
    model, data = gpt2()
    decision = prune_global(
        None, name, amount=None, pattern=pattern, calibration=calibrated(model, data)
    )
    for mask in decision.masks.values():
        assert (mask.mT.unflatten(1, (-1, 2 * kept)).sum(-1) == kept).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", [1, 2])
def test_patterns_of_convolutions_run_over_channels(name, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 4, 3, padding=1, groups=groups)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = [(torch.randn(6, 8, 5, 5), torch.zeros(6).long())]
    calibration = calibrated(model, data)
    mask = prune_global(None, name, amount=None, pattern="2:4", calibration=calibration).masks
    groups_of_channels = mask["0.weight"].movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
    assert (groups_of_channels == 2).all()


@pytest.mark.parametrize("name", [*NAMES, "layerwise"])
def test_patterns_hold_where_some_entries_are_pruned_already(name):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 4, 3, padding=1, groups=2)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = conv.weight.detach().abs() > 0.06
    before[:2] = True  # of one group of channels nothing is pruned yet
    prune.custom_from_mask(conv, "weight", before)
    data = [(torch.randn(6, 8, 5, 5), torch.zeros(6).long())]
    calibration = calibrated(model, data)
    mask = prune_global(None, name, amount=None, pattern="2:4", calibration=calibration).masks
    kept, left = (
        t.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) for t in (mask["0.weight"], before)
    )
    assert torch.equal(kept, left.clamp_max(2))
    assert not (mask["0.weight"] & ~before).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_global_budget_is_shared_out(name):
    model, data = mlp()
    decision = prune_global(
        None, name, amount=0.5, calibration=calibrated(model, data), scope="global"
    )
    kept = [int(mask.sum()) for mask in decision.masks.values()]
    assert sum(kept) == 72
    assert kept != [48, 24]


@pytest.mark.parametrize("name", NAMES)
def test_layers_without_tokens_are_pruned_by_magnitude(name):
    torch.manual_seed(0)
    model = Experts()
    calibration = calibrated(model, [(torch.randn(16, 3), torch.zeros(16).long())])
    dense = model.experts[2].weight.detach().clone()
    with pytest.warns(CalibrationWarning, match=r"experts\.2\.weight are pruned by magnitude"):
        mask = prune_global(None, name, amount=0.5, calibration=calibration).masks
    smallest = dense.abs().flatten().argsort()[:3]
    assert not mask["experts.2.weight"].flatten()[smallest].any()
    assert torch.equal(model.experts[2].weight, dense * mask["experts.2.weight"])


@pytest.mark.parametrize("name", [*NAMES, "layerwise"])
@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("4:8", 4)])
def test_patterns_of_layers_without_tokens(name, pattern, kept):
    torch.manual_seed(0)
    model = Experts(inputs=8)
    calibration = calibrated(model, [(torch.randn(16, 8), torch.arange(16) % 2)])
    dense = model.experts[2].weight.detach().clone()
    with pytest.warns(CalibrationWarning, match=r"experts\.2\.weight"):
        masks = prune_global(
            None, name, amount=None, pattern=pattern, calibration=calibration
        ).masks
    for mask in masks.values():
        assert (mask.unflatten(1, (-1, 2 * kept)).sum(-1) == kept).all()
    groups = dense.abs().unflatten(1, (-1, 2 * kept))
    expected = groups >= groups.topk(kept, dim=-1).values[..., -1:]
    assert torch.equal(masks["experts.2.weight"], expected.flatten(1))


@pytest.mark.parametrize("name", NAMES)
def test_weights_on_inputs_that_are_always_zero_go_first(name):
    model, data = mlp()
    data[0][0][:, 3] = 0.0
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.sign())
    mask = prune_global(None, name, amount=0.125, calibration=calibrated(model, data)).masks
    assert not mask["0.weight"][:, 3].any()
    assert int(mask["0.weight"].sum()) == 84


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_is_called_twice_is_pruned_once_for_all_its_tokens(name):
    torch.manual_seed(0)
    model = Twice()
    calibration = calibrated(model, [(torch.randn(16, 3), torch.zeros(16).long())])
    masks = prune_global(None, name, amount=0.34, calibration=calibration).masks
    assert {key: int(mask.sum()) for key, mask in masks.items()} == {
        "shared.weight": 6,
        "last.weight": 4,
    }


@pytest.mark.parametrize("name", NAMES)
def test_whole_groups_are_refused(name):
    model, data = mlp()
    with pytest.raises(ArgumentError, match="like '2:4'"):
        prune_global(None, name, amount=0.5, pattern="1x4", calibration=calibrated(model, data))
