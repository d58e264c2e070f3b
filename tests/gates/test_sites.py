"""Which sites are found in which family."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn

from tests.gates.cases import FAMILIES, LeNet, built, timm_model, torchvision_resnet, vgg
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import find_sites


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_recognised(family):
    model, _ = built(family)
    assert find_sites(model) == find_sites(model, FAMILIES[family][2])


@pytest.mark.parametrize("family", ["timm-vit", "hf-vit", "bert", "distilbert", "gpt2"])
def test_heads_and_hidden_units_of_transformers(family):
    sites = find_sites(built(family)[0])
    assert Counter(site.kind for site in sites) == {"head": 2, "hidden": 2}
    assert {site.units for site in sites if site.kind == "head"} == {3}
    assert {site.repeat for site in sites if site.kind == "head"} == {8}
    assert all(site.side == "in" for site in sites)
    without = find_sites(built(family)[0], heads=False)
    assert without == [site for site in sites if site.kind == "hidden"]


@pytest.mark.parametrize("build", [torchvision_resnet, timm_model])
@pytest.mark.parametrize(
    ("name", "inner", "everything"), [("resnet18", 8, 20), ("resnet50", 32, 53)]
)
def test_batch_norms_of_resnets(build, name, inner, everything):
    model = build(name)
    sites = find_sites(model)
    assert len(sites) == inner
    assert all(site.side == "out" and site.kind == "channel" for site in sites)
    assert all(
        model.get_submodule(site.producer or "").out_channels == site.units for site in sites
    )
    # The paper counts 20 gates with 4 800 units and 53 with 26 560.
    residual = find_sites(model, residual=True)
    assert len(residual) == everything
    assert sum(site.units for site in residual) == {"resnet18": 4800, "resnet50": 26560}[name]


def test_a_chain_gates_channels_behind_convolutions_and_hidden_units_in_front_of_linear_layers():
    sites = find_sites(LeNet())
    assert [(site.name, site.units, site.producer) for site in sites] == [
        ("conv1", 3, "conv1"),
        ("conv2", 4, "conv2"),
        ("fc2:in", 8, "fc1"),
        ("fc3:in", 6, "fc2"),
    ]
    assert [(site.name, site.producer) for site in find_sites(vgg())] == [("1", "0"), ("4", "3")]


def test_attention_of_unknown_models_is_left_out_of_a_chain():
    class OddAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.Sequential(OddAttention(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
    assert [site.name for site in find_sites(model)] == ["3:in"]


def test_norms_over_units_end_a_chain():
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.Linear(6, 2))
    assert [site.name for site in find_sites(model)] == ["3:in"]


def test_batch_norms_without_weights_get_no_gate():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 2, 3))
    with pytest.raises(ArgumentError, match="found none"):
        find_sites(model)


def test_one_layer_has_no_sites():
    with pytest.raises(ArgumentError, match=r"preset 'auto', found none in Linear"):
        find_sites(nn.Linear(3, 2))
