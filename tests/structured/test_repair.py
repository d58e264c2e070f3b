"""Repair: every fit against a dense solve, in the order of the pass, and nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from tests.contracts.state import unchanged
from tests.references.least_squares import fitted
from tests.references.masked_twin import random_kept
from tests.structured.models import SMALL, build, images
from torchprune_bayes import Calibration
from torchprune_bayes._numerics.input_moments import Moments, least_squares
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured import apply_plan, find_groups, plan_of, repair
from torchprune_bayes.structured._cutting import RepairReport, cut_with
from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
from torchprune_bayes.structured.repair import LayerRepair, Repair

NAN = float("nan")
LAYERS = {
    "linear": (nn.Linear(6, 3), (7, 6), 1),
    "linear without bias, of sequences": (nn.Linear(6, 3, bias=False), (4, 5, 6), 1),
    "Conv1D": (Conv1D(3, 6), (4, 5, 6), 0),
    "conv1d": (nn.Conv1d(4, 3, 3, stride=2, padding=2, dilation=2), (5, 4, 9), 1),
    "conv2d": (nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding="valid"), (4, 4, 6, 5), 1),
    "conv2d same": (nn.Conv2d(4, 3, (3, 2), padding="same", bias=False), (4, 4, 5, 4), 1),
    "conv2d circular": (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), (3, 4, 5, 4), 1),
    "conv3d": (nn.Conv3d(3, 2, 2, padding=1), (3, 3, 3, 4, 3), 1),
    "transposed": (nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1), (5, 4, 6), 0),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 2, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0)),
        (3, 4, 3, 4),
        0,
    ),
}


def mean_output(output: Tensor, target: Tensor) -> Tensor:
    return output.mean()


def reading(layer: Any, dim: int) -> UnitGroup:
    units = torch.arange(layer.weight.shape[dim])[:, None]
    return UnitGroup("before", "hidden", len(units), (UnitSlice("weight", dim, units, "consumer"),))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_each_kind_of_layer_against_a_dense_solve(name):
    layer, shape, dim = LAYERS[name]
    layer = copy.deepcopy(layer).double()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64) + 1.0
    calibration = Calibration(layer, [(inputs, torch.zeros(len(inputs)))], mean_output)
    group, gone = reading(layer, dim), [1, 2]
    kept = {"before": torch.tensor([u for u in range(group.units) if u not in gone])}
    found = repair(calibration, [group], kept, damping=1e-3)
    weight, shift = fitted(layer, inputs, gone, 1e-3, intercept=layer.bias is not None)
    torch.testing.assert_close(found.values["weight"], weight, rtol=1e-9, atol=1e-10)
    if layer.bias is not None:
        torch.testing.assert_close(found.values["bias"], layer.bias.detach() + shift)
    [fit] = found.layers
    assert 0.0 <= fit.error <= fit.cut_error


def test_a_channel_is_all_of_its_places_behind_a_flattening():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    model.double()
    x = torch.randn(40, 3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    [group] = find_groups(model, x)
    calibration = Calibration(model, [(x, torch.zeros(40))], mean_output)
    found = repair(calibration, [group], {"0": torch.tensor([0, 3])}, damping=1e-3)
    with torch.no_grad():
        flat = model[2](model[1](model[0](x)))
    weight, shift = fitted(model[3], flat, [*range(4, 12)], 1e-3, intercept=True)
    torch.testing.assert_close(found.values["3.weight"], weight)
    torch.testing.assert_close(found.values["3.bias"], model[3].bias.detach() + shift)


@pytest.mark.parametrize("damping", [1e-3, "auto"])
def test_kernels_that_only_see_padding_keep_their_weights(damping):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Conv2d(5, 3, 3, padding=1).double()
    centre = nn.Conv2d(5, 3, 1).double()
    centre.load_state_dict({"weight": layer.weight[:, :, 1:2, 1:2], "bias": layer.bias})
    x = torch.randn(30, 5, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = {"before": torch.tensor([0, 2, 4])}
    found = []
    for each in (layer, centre):
        calibration = Calibration(each, [(x + 1.0, torch.zeros(30))], mean_output)
        found.append(repair(calibration, [reading(each, 1)], kept, damping=damping).values)
    weight, expected = found[0]["weight"], layer.weight.detach().clone()
    expected[:, [1, 3]] = 0.0
    expected[:, :, 1, 1] = found[1]["weight"][:, :, 0, 0]
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(found[0]["bias"], found[1]["bias"])


def test_later_layers_are_fitted_on_what_repaired_ones_give():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
        ).double()
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = find_groups(model, x)
    kept = {"0": torch.tensor([0, 2, 3, 5]), "2": torch.tensor([1, 2, 4])}
    calibration = Calibration(model, [(x, torch.zeros(40))], mean_output)
    found = repair(calibration, groups, kept, damping=1e-4)
    with torch.no_grad():
        hidden = model[1](model[0](x))
        weight, shift = fitted(model[2], hidden, [1, 4], 1e-4, intercept=True)
        torch.testing.assert_close(found.values["2.weight"], weight)
        second = torch.tanh(hidden @ weight.T + model[2].bias + shift)
    weight, shift = fitted(model[4], second, [0, 3, 5], 1e-4, intercept=True)
    torch.testing.assert_close(found.values["4.weight"], weight)
    torch.testing.assert_close(found.values["4.bias"], model[4].bias.detach() + shift)


@pytest.mark.parametrize("name", SMALL)
def test_one_pass_and_many_passes_agree(name):
    model, x = build(name).double(), images(24).double()
    y = torch.arange(24) % 5
    groups = find_groups(model, x[:2])
    kept = random_kept(groups, 0.6)
    at_once = Calibration(model, [(x, y)], cross_entropy)
    apart = Calibration(model, [(x[:10], y[:10]), (x[10:], y[10:])], cross_entropy, memory_mb=0.25)
    with unchanged(model):
        one = repair(at_once, groups, kept, damping=1e-3)
        many = repair(apart, groups, kept, damping=1e-3)
    assert one.values.keys() == many.values.keys()
    assert one.skipped == many.skipped == ()
    for key, value in one.values.items():
        torch.testing.assert_close(many.values[key], value, msg=key)


def norm_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every batch norm is given."""
    seen: dict[str, Tensor] = {}
    norms = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [
        norm.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
        for path, norm in norms
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_outputs_of_batch_norms_keep_their_mean_and_variance(name, settled):
    model, x = build(name).double(), images(16).double()
    if settled:  # as after training: running statistics are those of the inputs
        for path in norm_inputs(model, x):
            norm, inputs = model.get_submodule(path), norm_inputs(model, x)[path]
            norm.running_mean.copy_(inputs.mean((0, 2, 3)))
            norm.running_var.copy_(inputs.var((0, 2, 3), correction=0))
    before = norm_inputs(model, x)
    groups = find_groups(model, x[:2])
    kept = random_kept(groups, 0.6)
    calibration = Calibration(model, [(x, torch.arange(16) % 5)], cross_entropy)
    found = repair(calibration, groups, kept)
    plan = plan_of(model, groups, kept)
    dense = copy.deepcopy(model)
    apply_plan(model, plan, values=found.values)
    after = norm_inputs(model, x)
    renewed = [path for path in after if f"{path}.running_mean" in found.values]
    assert renewed
    assert "1" not in renewed  # nothing in front of it has changed
    for path in renewed:
        norm, stays = model.get_submodule(path), plan.kept.get(f"{path}.running_mean", {}).get(0)
        if settled:
            torch.testing.assert_close(norm.running_mean, after[path].mean((0, 2, 3)))
            variance = after[path].var((0, 2, 3), correction=0)
            torch.testing.assert_close(norm.running_var, variance, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            old, new = dense.get_submodule(path)(before[path]), norm(after[path])
        old = old if stays is None else old[:, stays]
        torch.testing.assert_close(new.mean((0, 2, 3)), old.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(new.var((0, 2, 3)), old.var((0, 2, 3)), rtol=1e-2, atol=1e-3)


def test_what_a_batch_norm_swallows_is_fitted_as_a_bias():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Conv2d(4, 3, 1, bias=False)
        model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), inner, nn.BatchNorm2d(3)).double()
    model.eval()
    x = images(6, 5)[:, :2].double()
    groups = find_groups(model, x)
    calibration = Calibration(model, [(x, torch.zeros(6))], mean_output)
    kept = {"0": torch.tensor([0, 3])}
    found = repair(calibration, groups, kept, damping=1e-3)
    with torch.no_grad():
        hidden = model[1](model[0](x))
    weight, _ = fitted(inner, hidden, [1, 2], 1e-3, intercept=True)
    torch.testing.assert_close(found.values["2.weight"], weight)


class Functional(nn.Module):
    """Reads its second layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.second.weight, self.second.bias)


def test_layers_that_are_not_called_are_named(caplog):
    model = Functional()
    units = torch.arange(4)[:, None]
    group = UnitGroup(
        "first",
        "hidden",
        4,
        (
            UnitSlice("first.weight", 0, units, "producer"),
            UnitSlice("second.weight", 1, units, "consumer"),
        ),
    )
    calibration = Calibration(model, [(torch.ones(2, 3), torch.zeros(2))], mean_output)
    found = repair(calibration, [group], {"first": torch.tensor([0, 1])})
    assert (found.values, found.layers, found.skipped) == ({}, (), ("second",))
    assert "Not repaired" in caplog.text


def test_a_failure_half_way_leaves_the_model_alone():
    model, x = build("resnet"), images(8)
    groups = find_groups(model, x[:2])
    kept = random_kept(groups, 0.6)
    calibration = Calibration(model, [(x, torch.arange(8) % 5)], cross_entropy)
    handle = model[4].conv2.register_forward_hook(lambda *_: 1 / 0)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        repair(calibration, groups, kept)
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("damping", [0.0, -1.0, "best"])
def test_impossible_dampings_are_refused(damping):
    model, x = build("vgg"), images(4)
    calibration = Calibration(model, [(x, torch.arange(4))], cross_entropy)
    groups = find_groups(model, x)
    with unchanged(model), pytest.raises(ArgumentError, match="damping"):
        repair(calibration, groups, random_kept(groups), damping=damping)


def test_a_repair_that_raises_the_loss_is_not_taken(caplog):
    model, x = build("vgg"), images(8)
    twin = copy.deepcopy(model)
    calibration = Calibration(model, [(x, torch.arange(8) % 5)], cross_entropy)
    groups = find_groups(model, x[:2])
    kept = random_kept(groups, 0.6)
    plan = plan_of(model, groups, kept)
    found = repair(calibration, groups, kept)
    bad = Repair({"9.bias": torch.tensor([1e3, 0, 0, 0, 0])}, found.layers, ())
    _, report = cut_with(calibration, groups, plan, bad)
    assert not report.taken
    assert report.loss_repaired > report.loss_cut
    assert "left as it was cut, since the repair does not lower the loss" in caplog.text
    assert "on more samples" in caplog.text
    apply_plan(twin, plan)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in twin.state_dict().items())


@pytest.mark.parametrize(
    ("cut", "repaired", "taken"),
    [(1.0, 0.5, True), (1.0, 2.0, False), (NAN, 2.0, True), (1.0, NAN, False), (NAN, NAN, False)],
)
def test_a_loss_that_is_no_number_is_higher_than_any(cut, repaired, taken):
    layers = (LayerRepair("0", 1.0, 0.5, 1e-3),)
    assert RepairReport(layers, (), cut, repaired, 8, False, 0.1).taken is taken
    assert not RepairReport((), (), cut, repaired, 8, False, 0.1).taken
    assert "no layer" in str(RepairReport((), (), cut, repaired, 8, False, 0.1))


@given(
    outputs=st.integers(1, 4),
    inputs=st.integers(1, 7),
    count=st.integers(2, 30),
    intercept=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_no_other_map_on_what_stays_is_nearer(outputs, inputs, count, intercept, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    x = x.relu() if seed % 2 else x + 1.0
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    keep = torch.rand(inputs, generator=generator) < 0.6
    halves = Moments.zeros(inputs, x.device), Moments.zeros(inputs, x.device)
    for half, moments in enumerate(halves):
        moments.add(x[half::2])
    fit = least_squares(weight, keep, halves, intercept=intercept, damping=1e-6)

    def error(matrix: Tensor, shift: Tensor) -> float:
        ridge = x[:, keep] - x[:, keep].mean(0) if intercept else x[:, keep]
        scale = float(ridge.square().mean(0).mean()) if bool(keep.any()) else 0.0
        change = x @ (weight - matrix).T - shift
        penalty = 1e-6 * scale * (matrix - weight * keep).square().sum()
        return float(change.square().sum(1).mean() + penalty)

    assert not fit.weight[:, ~keep].any()
    best = error(fit.weight, fit.shift)
    assert fit.error <= fit.cut_error * (1 + 1e-9) + 1e-12
    for _ in range(3):
        step = 0.1 * torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) * keep
        shift = 0.1 * torch.randn(outputs, generator=generator, dtype=torch.float64) * intercept
        assert best <= error(fit.weight + step, fit.shift + shift) + 1e-9


def test_many_rows_are_thinned_out_over_all_places():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Conv2d(2, 2, 1).double()
    x = torch.randn(4, 2, 200, 200, generator=torch.Generator().manual_seed(0)).double()
    x[:, 0] = 2 * x[:, 1] + torch.linspace(0, 1, 200)[:, None]  # a bias that depends on the place
    calibration = Calibration(layer, [(x, torch.zeros(4))], mean_output)
    found = repair(calibration, [reading(layer, 1)], {"before": torch.tensor([1])}, damping=1e-6)
    weight, bias = layer.weight.detach().squeeze(), layer.bias.detach()
    expected = weight[:, 1] + 2 * weight[:, 0]
    torch.testing.assert_close(
        found.values["weight"].squeeze()[:, 1], expected, rtol=0.02, atol=0.02
    )
    torch.testing.assert_close(found.values["bias"], bias + weight[:, 0] / 2, rtol=0.02, atol=0.02)


def test_batches_of_different_lengths_are_fitted_together():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)
        ).double()
    tokens = [torch.arange(4 * size).reshape(4, size) % 9 for size in (5, 8, 3)]
    calibration = Calibration(model, [(each, torch.zeros(4)) for each in tokens], mean_output)
    units = torch.arange(6)[:, None]
    slices = (
        UnitSlice("1.weight", 0, units, "producer"),
        UnitSlice("1.bias", 0, units, "producer"),
        UnitSlice("3.weight", 1, units, "consumer"),
    )
    group = UnitGroup("1", "hidden", 6, slices)
    found = repair(calibration, [group], {"1": torch.tensor([0, 2, 3])}, damping=1e-3)
    with torch.no_grad():
        hidden = torch.cat([model[2](model[1](model[0](each))).flatten(0, 1) for each in tokens])
    weight, shift = fitted(model[3], hidden, [1, 4, 5], 1e-3, intercept=True)
    torch.testing.assert_close(found.values["3.weight"], weight)
    torch.testing.assert_close(found.values["3.bias"], model[3].bias.detach() + shift)
