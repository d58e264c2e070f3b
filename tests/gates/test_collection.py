"""What is done with all gates of a model together."""

from __future__ import annotations

import pytest
import torch

from tests.gates.cases import built, scatter
from torchprune_bayes.gates import WeightNorm, attach_gates


def test_kl_is_the_sum_over_open_gates_and_the_papers_mean_weighs_layers_alike():
    gates = attach_gates(built("lenet")[0])
    scatter(gates)
    each = [gate.kl().detach() for gate in gates.values()]
    assert float(gates.kl().detach()) == pytest.approx(float(torch.cat(each).sum()))
    expected = sum(float(kl.mean()) for kl in each) / len(each)
    assert float(gates.mean_kl().detach()) == pytest.approx(expected)


def test_pruning_closes_what_the_criterion_says_and_never_opens():
    gates = attach_gates(built("mlp")[0])
    with torch.no_grad():
        gates["2:in"].mu.copy_(torch.tensor([0.0, -20, -20, 0, 0]))
    assert gates.prune("mean") == 2
    assert gates["2:in"].mask.tolist() == [True, False, False, True, True]
    with torch.no_grad():
        gates["2:in"].mu.zero_()
    assert gates.prune("mean") == 0
    assert gates.closed == 2
    assert gates.prune("mean", regrow=True) == -2


def test_norms_are_those_of_the_producer_or_of_the_site_itself():
    model, _ = built("lenet")
    gates = attach_gates(model)
    weight = model.fc1.weight.detach().double()
    torch.testing.assert_close(gates.weight_norms("fc2:in"), weight.norm(dim=1))
    filters = model.conv1.weight.detach().double()
    torch.testing.assert_close(gates.weight_norms("conv1"), filters.flatten(1).norm(dim=1))
    margins = gates.margins(WeightNorm(0.25))["fc2:in"]
    torch.testing.assert_close(margins, 0.25 - weight.norm(dim=1))


def test_norms_of_heads_are_those_of_what_reads_them():
    model, _ = built("gpt2")
    gates = attach_gates(model)
    name = "model.transformer.h.0.attn.c_proj:in"
    weight = model.model.transformer.h[0].attn.c_proj.weight.detach().double()  # [in, out]
    expected = weight.view(3, 8 * 24).norm(dim=1)
    torch.testing.assert_close(gates.weight_norms(name), expected)


def test_a_whole_head_is_closed():
    model, x = built("distilbert")
    gates = attach_gates(model)
    name = "model.distilbert.transformer.layer.1.attention.out_lin:in"
    assert gates.sites[name].kind == "head"
    seen = []
    projection = model.get_submodule(name.removesuffix(":in"))
    gates[name].close(torch.tensor([False, True, False]))
    projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    assert not seen[0][..., 8:16].any()
    assert seen[0][..., :8].all()
