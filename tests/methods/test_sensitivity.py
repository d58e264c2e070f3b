"""What batch norms normalise by while weights are scored, against training batches by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from tests.contracts.state import unchanged
from tests.methods.sensitivity_cases import conv_net, data_for
from tests.references.sensitivity import summed_over_training_batches, weights_of
from torchprune_bayes import Calibration, prune_global
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.methods import FORCE, SNIP, GraSP, IterativeSNIP, SNIPit

SHAPE = (18, 2, 5, 5)
Batches = list[tuple[Tensor, Tensor]]


def untrained() -> nn.Sequential:
    """A network whose batch norm has seen no data, with dropout after it."""
    model = conv_net()
    model[1].reset_running_stats()  # type: ignore[operator]
    model.insert(3, nn.Dropout(0.5))
    return model


def batches() -> Batches:
    x, y = data_for(*SHAPE, classes=3)
    return list(zip(x.split([10, 8]), y.split([10, 8]), strict=True))


def calibration_of(model: nn.Module) -> Calibration:
    return Calibration(model, batches(), cross_entropy)


def scores_by(method: type, model: nn.Module, **options: Any) -> dict[str, Tensor]:
    calibration = calibration_of(model)
    scores = method(1, calibration=calibration, **options).decide(calibration.space).scores
    assert scores is not None
    return scores


def shares(products: dict[str, Tensor]) -> dict[str, Tensor]:
    total = sum(product.abs().sum() for product in products.values())
    return {name: product.abs() / total for name, product in products.items()}


def test_the_statistics_of_the_batch_are_those_of_training():
    model = untrained()
    expected = summed_over_training_batches(
        untrained(), cross_entropy, batches(), weights_of(model)
    )
    found = scores_by(SNIP, model, batch_norm="batch")
    torch.testing.assert_close(found, shares(expected), rtol=1e-10, atol=1e-14)
    running = scores_by(SNIP, model)
    assert not torch.allclose(running["0.weight"], found["0.weight"], rtol=0.1)


def test_the_elasticity_is_in_units_of_the_loss_of_those_batches():
    model = untrained()
    products = summed_over_training_batches(
        untrained(), cross_entropy, batches(), weights_of(model)
    )
    twin = untrained().train()
    twin[3].eval()
    loss = sum(float(cross_entropy(twin(x), y).detach()) * len(y) for x, y in batches()) / SHAPE[0]
    found = scores_by(SNIPit, model, start=1.0, batch_norm="batch")
    for name, product in products.items():
        expected = product.abs() / (loss + 1e-8)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", [IterativeSNIP, FORCE])
def test_every_step_normalises_what_is_left(method):
    model, amount, kept = untrained(), 0.9, 0.1
    weights = weights_of(model)
    entries = sum(weight.numel() for weight in weights.values())
    masks = {name: torch.ones_like(weight) for name, weight in weights.items()}
    for share in (kept ** (1 / 2), kept):
        left = {name: weight * masks[name] for name, weight in weights.items()}
        twin = untrained()
        products = summed_over_training_batches(twin, cross_entropy, batches(), left)
        if method is FORCE:  # the gradient at what is left, by the dense weight
            products = {name: w * twin.get_parameter(name).grad for name, w in weights.items()}
        flat = torch.cat([product.abs().flatten() for product in products.values()])
        threshold = flat.sort().values[round((1 - share) * entries)]
        masks = {name: (product.abs() >= threshold).double() for name, product in products.items()}
    options = {"steps": 2, "batch_norm": "batch", "calibration": calibration_of(model)}
    found = prune_global(None, method, amount=amount, **options)
    assert all(torch.equal(found.masks[name], mask.bool()) for name, mask in masks.items())


def test_grasp_takes_gradient_and_hessian_of_the_same_batches():
    model = untrained()
    twin = untrained().train()
    twin[3].eval()
    leaves = [twin.get_parameter(name) for name in weights_of(twin)]
    pairs = batches() * 5  # one pass of gradients is longer than 64 samples
    loss = sum(cross_entropy(twin(x), y) * len(y) for x, y in pairs) / (5 * SHAPE[0])
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)
    slope = sum((g * g.detach()).sum() for g in gradient)
    product = torch.autograd.grad(slope, leaves)
    calibration = Calibration(model, pairs, cross_entropy)
    options = {"temperature": 1.0, "batch_norm": "batch", "calibration": calibration}
    found = GraSP(1, **options).decide(calibration.space).scores
    assert found is not None
    for score, leaf, hg in zip(found.values(), leaves, product, strict=True):
        expected = leaf.detach() * hg
        torch.testing.assert_close(score, expected, rtol=1e-8, atol=expected.abs().max() * 1e-11)


@pytest.mark.parametrize("method", [SNIP, SNIPit, GraSP, FORCE])
def test_modes_hooks_and_running_statistics_stay(method):
    for model in (untrained().train(), untrained().eval()):
        model[1].eval()
        with unchanged(model):
            scores_by(method, model, batch_norm="batch")
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failure_leaves_no_hooks():
    model = untrained()
    x, _ = data_for(*SHAPE, classes=3)
    calibration = Calibration(model, [(x, torch.full((len(x),), 7))], cross_entropy)
    with unchanged(model), pytest.raises(IndexError):
        SNIP(1, calibration=calibration, batch_norm="batch").decide(calibration.space)


def test_a_batch_of_one_sample_keeps_the_running_statistics():
    model = conv_net()
    x, y = data_for(3, 2, 5, 5, classes=3)
    calibration = Calibration(model, list(zip(x.split(1), y.split(1), strict=True)), cross_entropy)
    by_batch, by_running = (
        SNIP(1, calibration=calibration, batch_norm=kind).decide(calibration.space).scores
        for kind in ("batch", "running")
    )
    torch.testing.assert_close(by_batch, by_running)


def test_inputs_may_come_by_keyword():
    class ByKeyword(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for module in self:
                x = module(input=x)
            return x

    model = untrained()
    found = scores_by(SNIP, ByKeyword(*copy.deepcopy(model)), batch_norm="batch")
    torch.testing.assert_close(found, scores_by(SNIP, model, batch_norm="batch"))


def test_running_statistics_can_be_filled_by_the_hosts_own_function():
    model, twin = untrained(), untrained()
    update_bn(batches(), model)
    first, second = (twin[0](x).detach() for x, _ in batches())
    means = torch.stack([first.mean((0, 2, 3)), second.mean((0, 2, 3))])
    torch.testing.assert_close(model[1].running_mean, means.mean(0))
    with unchanged(model):
        filled = scores_by(SNIP, model)
    assert not torch.allclose(filled["0.weight"], scores_by(SNIP, twin)["0.weight"], rtol=0.1)


@pytest.mark.parametrize("method", [SNIP, SNIPit, GraSP, FORCE, IterativeSNIP])
def test_refuses_other_statistics(method):
    with pytest.raises(ArgumentError, match="`batch_norm` to be one of"):
        method(0.5, batch_norm="train")


def test_refuses_batch_norms_that_would_wait_for_other_processes():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(untrained())
    with unchanged(model), pytest.raises(ParameterError, match="SyncBatchNorm at `1`"):
        scores_by(SNIP, model, batch_norm="batch")
