"""Which sites are found in which family."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from tests.gates.cases import FAMILIES, LeNet, built, timm_model, torchvision_resnet, vgg
from tests.wiring.models import Attention
from tests.wiring.models import build as wired
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import attach_gates, find_sites, gates_of
from torchprune_bayes.methods import prune_gated


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


class Residual(nn.Module):
    """A block whose input skips it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Backwards(nn.Module):
    """Layers that run in another order than they were registered."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(torch.relu(self.first(x))))


@pytest.mark.parametrize("preset", ["auto", "chain"])
@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 8), Residual(), nn.Linear(8, 2)), "several oper"),
        (Backwards, "in the order in which they were registered"),
        (Twice, "do not run once each"),
        (lambda: Attention("apart"), "several operations read|cannot be followed"),
    ],
)
def test_what_is_no_chain_is_not_read_as_one(build, why, preset):
    with pytest.raises(ArgumentError, match=f"({why}).*give `example_inputs`"):
        find_sites(build(), preset)


def test_sites_are_seen_in_a_run():
    model = nn.Sequential(nn.Linear(4, 8), Residual(), Residual(), nn.Linear(8, 2))
    sites = find_sites(model, example_inputs=torch.ones(2, 4))
    assert [(site.name, site.units, site.producer) for site in sites] == [
        ("1.down:in", 16, "1.up"),
        ("2.down:in", 16, "2.up"),
    ]
    assert [site.name for site in find_sites(Backwards(), example_inputs=torch.ones(2, 4))] == [
        "last:in"
    ]


@pytest.mark.parametrize("name", ["heads in blocks", "heads apart", "heads that share keys"])
def test_heads_are_seen_in_a_run(name):
    model, inputs = wired(name)
    [site] = find_sites(model, example_inputs=inputs)
    assert (site.name, site.kind, site.units * site.repeat) == ("o:in", "head", 24)
    assert find_sites_or_none(model, inputs) == []


def find_sites_or_none(model, inputs):
    try:
        return find_sites(model, example_inputs=inputs, heads=False)
    except ArgumentError:
        return []


@pytest.mark.parametrize("name", ["heads interleaved", "heads that share keys", "gated halves"])
def test_closed_gates_and_cut_units_agree(name):
    model, inputs = wired(name)
    gates = attach_gates(model, example_inputs=inputs)
    with torch.no_grad():
        for gate in gates.values():
            gate.mu[1], gate.log_sigma[1] = -19.0, 1.0
    closed, pruned = copy.deepcopy(model), copy.deepcopy(model)
    assert gates_of(closed).prune() == len(gates)
    prune_gated(pruned)
    torch.testing.assert_close(pruned(inputs), closed(inputs), atol=1e-5, rtol=1e-5)


def test_norms_over_units_end_a_chain():
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.Linear(6, 2))
    assert [site.name for site in find_sites(model)] == ["3:in"]


def test_batch_norms_without_weights_get_no_gate():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 2, 3))
    with pytest.raises(ArgumentError, match="got none"):
        find_sites(model)


def test_one_layer_has_no_sites():
    with pytest.raises(ArgumentError, match=r"preset 'auto', got none in Linear"):
        find_sites(nn.Linear(3, 2))


def test_units_that_several_layers_read_get_no_gate():
    for name in ("chunks", "both directions"):
        model, inputs = wired(name)
        with pytest.raises(ArgumentError, match="got none"):
            find_sites(model, example_inputs=inputs)


class Branching(nn.Module):
    """Channels behind a batch norm that two layers read."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.activation = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), activation
        self.b, self.c = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.a(x)))
        return self.b(x) + self.c(x)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.PReLU(), nn.Hardswish()])
def test_a_norm_holds_a_gate_where_zero_stays_zero(activation):
    sites = find_sites(Branching(activation).eval(), example_inputs=torch.ones(1, 3, 4, 4))
    assert [(site.name, site.units) for site in sites] == [("norm", 6)]


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid()])
def test_a_norm_holds_no_gate_where_a_closed_one_leaves_a_constant(activation):
    with pytest.raises(ArgumentError, match="got none in Branching"):
        find_sites(Branching(activation).eval(), example_inputs=torch.ones(1, 3, 4, 4))


class Lending(nn.Module):
    """Two layers, the second of which lends its weight and is never called, as in Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(self.a(x)).relu(), self.b.weight, self.b.bias)


def test_a_layer_that_is_not_called_holds_no_gate():
    [site] = find_sites(Lending(), "auto", torch.ones(2, 4))
    assert (site.name, site.side) == ("norm", "out")
    model = Lending().eval()
    gates = attach_gates(model, "auto", torch.ones(2, 4))
    model(torch.ones(2, 4)).sum().backward()
    assert all(gate.mu.grad is not None for gate in gates.values())


class Recurrent(nn.Module):
    """The state is read by the next layer and by the recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[0])


def test_units_that_several_layers_read_have_no_site_and_the_refusal_says_so():
    with pytest.raises(ArgumentError, match="Recurrent; none of its units are all read by one"):
        find_sites(Recurrent(), "auto", torch.ones(2, 4, 3))


def resnet_with(activation: nn.Module) -> nn.Module:
    """A ResNet of torchvision with another activation in its stem and blocks."""
    model = torchvision_resnet()
    for module in model.modules():
        if isinstance(getattr(module, "relu", None), nn.Module):
            module.relu = activation
    return model.eval()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("preset", ["auto", "resnet"])
def test_a_resnet_holds_no_gates_whose_closed_units_go_on_as_constants(preset, residual):
    model = resnet_with(nn.Sigmoid())
    with pytest.raises(ArgumentError, match=r"got none in ResNet|a chain of layers"):
        find_sites(model, preset, residual=residual)
    gates = attach_gates(model, "auto", torch.ones(2, 3, 32, 32), preserve=True)
    assert {site.side for site in gates.sites.values()} == {"in"}
    for name, gate in gates.items():
        gate.close(torch.arange(gate.units) % 3 == 1) if "layer1" in name else None
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    closed = model(inputs)
    prune_gated(model)
    torch.testing.assert_close(model(inputs), closed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.Tanh()])
def test_a_resnet_with_another_activation_that_keeps_zeros_holds_all_gates(activation):
    assert find_sites(resnet_with(activation)) == find_sites(torchvision_resnet())
    sites = find_sites(resnet_with(activation), residual=True)
    assert sites == find_sites(torchvision_resnet(), residual=True)


def test_a_block_that_does_not_run_on_its_own_holds_no_gates():
    class BasicBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.conv2 = nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x + scale * self.conv2(self.bn1(self.conv1(x)))

    with pytest.raises(ArgumentError, match="got none in BasicBlock"):
        find_sites(BasicBlock(), "resnet")


@pytest.mark.parametrize(("activation", "sides"), [("sigmoid", "in"), ("tanh", "out")])
def test_a_chain_gates_in_front_of_the_next_layer_what_an_activation_makes_constant(
    activation, sides
):
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3), nn.Linear(80, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = getattr(torch, activation)(self.b(getattr(torch, activation)(self.a(x))))
            return self.c(nn.functional.avg_pool2d(x, 2).view(-1, 80))

    sites = find_sites(Chain())
    behind = [("a", "out", 4), ("b", "out", 5)]
    expected = [("b", "in", 4)] if sides == "in" else behind
    assert [(site.module, site.side, site.units) for site in sites] == expected


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus()])
def test_norms_of_a_chain_hold_no_gates_in_front_of_what_makes_zeros_constant(activation):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), activation, nn.Linear(5, 3)).eval()
    gates = attach_gates(model)
    assert [(site.module, site.side) for site in gates.sites.values()] == [("3", "in")]
    gates["3:in"].close(torch.arange(5) % 2 == 1)
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    closed = model(inputs)
    prune_gated(model)
    torch.testing.assert_close(model(inputs), closed)
