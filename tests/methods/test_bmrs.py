"""The structured method behaves as PyTorch's own structured methods do, without an amount."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.gates.cases import FAMILIES, built, scatter
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.gates import Gates, NoiseGate, Site, attach_gates, fold_gates
from torchprune_bayes.methods import BMRS, find_method, prune_gated, prune_global


def gated_conv(pruned: list[int], units: int = 6) -> tuple[nn.Conv2d, NoiseGate]:
    """A convolution with a gate whose ``pruned`` channels have collapsed, the last one most."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, units, 3)
    gate = attach_gates(layer, ["*"])[""]
    collapse(gate, pruned)
    return layer, gate


@torch.no_grad()
def collapse(gate: NoiseGate, pruned: list[int]) -> None:
    for rank, unit in enumerate(pruned):
        gate.mu[unit], gate.log_sigma[unit] = -18.0 - 0.1 * rank, 1.0


def rows(layer: nn.Module) -> list[int]:
    """Rows of the weight that are remaining."""
    mask = layer.get_buffer("weight_mask")
    assert torch.equal(
        mask, mask.flatten(1)[:, :1].view(-1, *[1] * (mask.ndim - 1)).expand_as(mask)
    )
    return mask.flatten(1)[:, 0].nonzero().flatten().tolist()


def test_without_an_amount_the_evidence_decides_on_rows_and_bias():
    layer, gate = gated_conv([1, 4])
    x = torch.randn(2, 3, 5, 5)
    hook = BMRS.apply(layer, "weight")
    assert isinstance(hook, BMRS)
    assert rows(layer) == [0, 2, 3, 5]
    assert layer.bias_mask.tolist() == [1, 0, 1, 1, 0, 1]
    pruned = layer.eval()(x)
    gate.close(torch.arange(6) % 3 == 1)
    for name in ("weight", "bias"):
        prune.remove(layer, name)
    assert torch.equal(layer(x), pruned)
    assert not pruned[:, [1, 4]].any()


@pytest.mark.parametrize(
    ("amount", "left"),
    [(1, [0, 1, 2, 3, 5]), (0.17, [0, 1, 2, 3, 5]), (6, [0, 2, 3, 5]), (0, list(range(6)))],
)
def test_an_amount_is_a_cap(amount, left):
    layer, _ = gated_conv([1, 4])
    BMRS.apply(layer, "weight", amount)
    assert rows(layer) == left


def test_beyond_the_evidence():
    layer, gate = gated_conv([1, 4])
    with torch.no_grad():
        gate.log_sigma[2] = 0.0
    BMRS.apply(layer, "weight", 3, beyond=True)
    assert rows(layer) == [0, 3, 5]


def test_one_unit_always_stays():
    layer, _ = gated_conv([0, 1, 2], units=3)
    BMRS.apply(layer, "weight")
    assert rows(layer) == [0]


@pytest.mark.parametrize("criterion", ["bmrs-n", "bmrs-u8", "bmrs-u4", "snr", "mean"])
def test_every_criterion(criterion):
    layer, _ = gated_conv([3])
    BMRS.apply(layer, "weight", criterion=criterion)
    assert rows(layer) == [0, 1, 2, 4, 5]


def test_norms_as_a_criterion():
    layer, _ = gated_conv([])
    with torch.no_grad():
        layer.weight[2] *= 0.01
    BMRS.apply(layer, "weight", criterion="l2")
    assert 2 not in rows(layer)


def test_again_and_on_top_of_others():
    layer, gate = gated_conv([1])
    prune.ln_structured(layer, "weight", 1, n=2, dim=0)
    gone = set(range(6)) - set(rows(layer))
    hook = BMRS.apply(layer, "weight")
    assert isinstance(hook, prune.PruningContainer)
    assert set(rows(layer)) == set(range(6)) - gone - {1}
    collapse(gate, [5])
    BMRS.apply(layer, "weight")
    assert set(rows(layer)) == set(range(6)) - gone - {1, 5}
    BMRS.apply(layer, "weight")
    assert set(rows(layer)) == set(range(6)) - gone - {1, 5}


def test_a_gate_that_was_closed_is_masked_whatever_its_posterior():
    layer, gate = gated_conv([])
    gate.close(torch.arange(6) == 2)
    BMRS.apply(layer, "weight")
    assert rows(layer) == [0, 1, 3, 4, 5]


def test_columns_where_the_gate_works_on_the_input():
    model, _ = built("mlp")
    gates = attach_gates(model)
    collapse(gates["2:in"], [3])
    BMRS.apply(model[2], "weight")
    assert model[2].weight_mask.tolist() == [[1, 1, 1, 0, 1]] * 4
    assert not hasattr(model[2], "bias_mask")
    BMRS.apply(model[0], "weight", gate=gates["2:in"])
    assert rows(model[0]) == [0, 1, 2, 4]
    assert model[0].bias_mask.tolist() == [1, 1, 1, 0, 1]


def test_what_stays_on_the_module_is_the_hosts():
    layer, _ = gated_conv([1])
    BMRS.apply(layer, "weight")
    hook = layer._forward_pre_hooks[next(iter(layer._forward_pre_hooks))]
    assert not [v for v in vars(hook).values() if isinstance(v, (torch.Tensor, nn.Module))]
    x = torch.randn(1, 3, 3, 3)
    assert torch.equal(pickle.loads(pickle.dumps(layer.eval()))(x), layer(x))
    assert list(layer._parameters) == ["weight_orig", "bias_orig"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gate": NoiseGate(5)}, ArgumentError, "Expected 5 entries along dimension 0"),
        ({"importance_scores": torch.ones(6, 3, 3, 3)}, ArgumentError, "no importance_scores"),
        ({"criterion": "l1"}, ArgumentError, "Expected one of snr"),
        ({"amount": 1.5}, ArgumentError, "fraction in"),
        ({"amount": 7}, ArgumentError, "at most 6"),
        ({"beyond": True}, ArgumentError, "with beyond=True"),
        ({"gate": NoiseGate(3, repeat=2)}, ArgumentError, "use prune_gated"),
        ({"gate": 3}, ArgumentTypeError, "Expected `gate=`"),
    ],
)
def test_failures_change_nothing(options, error, message):
    layer, _ = gated_conv([1])
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    hooks = dict(layer._forward_pre_hooks)
    with pytest.raises(error, match=message):
        BMRS.apply(layer, "weight", **options)
    assert list(layer.state_dict()) == list(before)
    assert all(torch.equal(layer.state_dict()[name], t) for name, t in before.items())
    assert dict(layer._forward_pre_hooks) == hooks


def test_a_layer_without_a_gate():
    with pytest.raises(ArgumentTypeError, match="a gate on the Linear, got None"):
        BMRS.apply(nn.Linear(2, 2), "weight")


def test_calls_over_single_weights_refuse_it():
    assert find_method("bmrs").is_structured
    assert not find_method("magnitude").is_structured
    layer, _ = gated_conv([1])
    with pytest.raises(ArgumentTypeError, match="unstructured method"):
        prune_global([(layer, "weight")], "bmrs", amount=0.5)
    with pytest.raises(TypeError, match='Only "unstructured"'):
        prune.global_unstructured([(layer, "weight")], pruning_method=BMRS, amount=0.5)


def closed_model(family: str) -> tuple[nn.Module, torch.Tensor, Gates]:
    model, x = built(family)
    gates = attach_gates(model)
    scatter(gates)
    return model, x, gates


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_weights_are_closed_gates(family):
    model, x, gates = closed_model(family)
    masks = prune_gated(model, "snr")
    assert gates.closed
    expected = model(x)
    assert all(torch.equal(masks[name], gate.mask) for name, gate in gates.items())
    # With the gates open again the masks alone must close the units.
    for gate in gates.values():
        gate.mask.fill_(True)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_masks_grow_with_the_gates_and_fold_with_them():
    model, x, gates = closed_model("lenet")
    first = prune_gated(model, "snr", amount=0)
    with torch.no_grad():
        gates["fc3:in"].mu[5] = -20.0
    second = prune_gated(model, "mean")
    for name, mask in first.items():
        assert not (second[name] & ~mask).any()
    assert not second["fc3:in"][5]
    expected = model(x)
    fold_gates(model)
    torch.testing.assert_close(model(x), expected)
    for module, name in [(model.fc3, "weight"), (model.fc2, "weight"), (model.fc2, "bias")]:
        prune.remove(module, name)
    assert not model.fc3.weight[:, 5].any()
    assert not model.fc2.weight[5].any()
    assert model.fc2.bias[5] == 0


def test_batch_norms_are_masked_along():
    model, _ = built("vgg")
    gates = attach_gates(model)
    collapse(gates["1"], [2])
    prune_gated(model)
    for module, name in [
        (model[0], "weight"),
        (model[0], "bias"),
        (model[1], "weight"),
        (model[1], "bias"),
    ]:
        mask = (
            getattr(module, f"{name}_mask").flatten(1)
            if name == "weight" and module is model[0]
            else getattr(module, f"{name}_mask")
        )
        assert (mask == 0).nonzero()[:, 0].unique().tolist() == [2]


def test_sites_without_a_known_producer():
    model, _ = built("mlp")
    gates = attach_gates(model, [Site("2", "in", 5)])
    collapse(gates["2:in"], [0])
    prune_gated(model)
    assert not hasattr(model[0], "weight_mask")
    assert model[2].weight_mask[0].tolist() == [0, 1, 1, 1, 1]


def test_a_model_without_gates():
    with pytest.raises(ArgumentError, match="got none"):
        prune_gated(nn.Linear(2, 2))
