"""Shrinking: exact targets, nothing left behind on failure, and models that still compute."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from tests.contracts.state import unchanged
from tests.references.masked_twin import masked_twin
from tests.structured.models import SMALL, build, images, timm_model, torchvision_model, unsettled
from tests.structured.shrink_cases import Fixed, RowNorm, flops, parameters
from torchprune_bayes.errors import (
    ArgumentError,
    ArgumentTypeError,
    NumericalError,
    ParameterError,
    TorchPruneBayesError,
)
from torchprune_bayes.gates import attach_gates
from torchprune_bayes.structured import BMRSImportance, ShrinkReport, find_groups, shrink
from torchprune_bayes.structured.groups import Kept, UnitGroup, UnitSlice
from torchprune_bayes.structured.unit_costs import UnitCosts


@pytest.mark.parametrize("target", ["params", "channels", "flops"])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name, target):
    model, inputs = build(name), images()
    dense = copy.deepcopy(model)
    report = shrink(model, inputs, RowNorm(), sparsity=0.4, target=target, steps=2)
    asked = {"params": report.parameters, "channels": report.units, "flops": report.flops}[target]
    assert asked.sparsity >= 0.4
    assert (report.parameters.before, report.parameters.after) == (
        parameters(dense),
        parameters(model),
    )
    assert report.flops is not None
    assert (report.flops.before, report.flops.after) == (flops(dense, inputs), flops(model, inputs))
    groups = find_groups(dense, inputs)
    kept = {group.name: _units_left(group, report) for group in groups}
    with torch.no_grad():
        difference = (masked_twin(dense, groups, kept)(inputs) - model(inputs)).abs().max()
    assert difference < 1e-5
    assert report.difference is not None
    assert report.difference < 1e-5
    model(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def _units_left(group: UnitGroup, report: ShrinkReport) -> Tensor:
    piece = group.slices[0]
    indices = report.plan.kept.get(piece.name, {}).get(piece.dim)
    stays = piece.positions if indices is None else indices
    return torch.isin(piece.positions[:, 0], stays).nonzero()[:, 0]


@pytest.mark.parametrize(
    ("make", "name"),
    [(torchvision_model, "mobilenet_v2"), (timm_model, "resnet18"), (timm_model, "convnext_tiny")],
)
def test_published_architectures(make, name):
    with torch.random.fork_rng():
        model = unsettled(make(name))
    inputs = images(1, 64)
    costs = UnitCosts.measure(model, find_groups(model, inputs), inputs)
    report = shrink(model, inputs, RowNorm(), sparsity=0.3, round_to=8)
    left = {group.name: group.units.after for group in report.groups}
    one_block_less = [
        costs.parameters({**left, group.name: left[group.name] + 8})
        for group in report.groups
        if group.units.after < group.units.before
    ]
    assert parameters(model) <= 0.7 * costs.parameters({}) < max(one_block_less)
    assert model.training
    assert all(
        group.units.after == group.units.before or group.units.after % 8 == 0
        for group in report.groups
    )


def test_a_transformer_of_a_served_family():
    import timm

    with torch.random.fork_rng():
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    inputs = images(2, 32)
    before = flops(model.eval(), inputs)
    report = shrink(model, inputs, RowNorm(), sparsity=0.3, target="flops")
    assert 0.3 <= 1 - flops(model, inputs) / before < 0.31
    assert {group.kind for group in report.groups} == {"head", "hidden"}
    blind = shrink(model, None, RowNorm(), sparsity=0.1, verify=False)
    assert (blind.flops, blind.difference) == (None, None)


def test_steps_score_what_is_left():
    model, inputs = build("resnet"), images()
    importance = RowNorm()
    seen: list[int] = []
    importance.needs_recalibration = True
    inner = importance.prepare
    importance.prepare = lambda m, g: (seen.append(sum(x.units for x in g)), inner(m, g))[1]
    report = shrink(
        model, inputs, importance, sparsity=0.5, target="channels", steps=[0.1, 0.3, 0.5]
    )
    total = report.units.before
    assert seen == [total, total - round(0.1 * total), total - round(0.3 * total)]
    assert report.steps == 3
    once = RowNorm()
    shrink(build("resnet"), inputs, once, sparsity=0.5, target="channels", steps=3)
    assert once.calls.count("prepare") == 1
    assert once.calls.count("0") == 3


def test_evidence_removes_what_scores_below_the_threshold_and_keeps_the_floor():
    model, inputs = build("vgg"), images()
    scores: dict[str, Tensor | None] = {
        "0": torch.tensor([-1.0, 1.0, -2.0, 3.0, 0.0, -0.1]),
        "3": -torch.arange(1.0, 9.0),
    }
    report = shrink(model, inputs, Fixed(scores), target="evidence", min_keep=2)
    assert report.plan.kept["0.weight"][0].tolist() == [1, 3, 4]
    assert report.plan.kept["3.weight"][0].tolist() == [0, 1]
    assert model[7].in_features == 32
    assert model[7].out_features == 10
    assert report.sparsity is None


def test_evidence_needs_a_threshold_and_no_sparsity():
    model, inputs = build("vgg"), images()
    with unchanged(model), pytest.raises(ArgumentError, match="with a threshold"):
        shrink(model, inputs, RowNorm(), target="evidence")
    with unchanged(model), pytest.raises(ArgumentError, match="no sparsity"):
        shrink(model, inputs, Fixed({}), target="evidence", sparsity=0.5)


def test_survivors_can_make_up_for_what_goes():
    class Compensating(Fixed):
        """Adds what leaves with a constant unit to the bias behind it."""

        def update(
            self, model: nn.Module, groups: Sequence[UnitGroup], kept: Kept
        ) -> dict[str, Tensor]:
            weight = model.get_parameter("2.weight").detach()
            gone = torch.ones(3, dtype=torch.bool)
            gone[kept["0"]] = False
            bias = model.get_parameter("2.bias").detach()
            return {"2.bias": bias + weight[:, gone] @ model.get_parameter("0.bias").detach()[gone]}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = 0.0
    inputs = torch.linspace(-1, 1, 8).reshape(2, 4)
    expected = model(inputs).detach()
    importance = Compensating({"0": torch.tensor([1.0, 0.0, 2.0])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shrink(model, inputs, importance, sparsity=0.3, target="channels", optimizer=optimizer)
    torch.testing.assert_close(model(inputs), expected)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}


def test_optimizer_and_averages_follow_through_several_steps():
    model, inputs = build("resnet"), images()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(inputs).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[4].conv1.weight]["momentum_buffer"].clone()
    report = shrink(
        model, inputs, RowNorm(), sparsity=0.4, steps=3, optimizer=optimizer, ema=average
    )
    weight = model[4].conv1.weight
    cut = report.plan.cut("4.conv1.weight", momentum)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], cut)
    assert average.module[4].conv1.weight.shape == weight.shape
    assert parameters(average.module) == parameters(model)
    optimizer.step()


def test_an_importance_of_the_host_passes_unchanged():
    model, inputs = build("resnet"), images()
    importance = tp.importance.GroupMagnitudeImportance(p=1)
    graph = tp.DependencyGraph().build_dependency(copy.deepcopy(model), inputs)
    expected = {
        group[0].dep.target.name.split(" ")[0]: importance(group)
        for group in graph.get_all_groups()
    }
    report = shrink(model, inputs, importance, sparsity=0.3, target="channels", allocation="layer")
    lowest = expected["4.conv1"].argsort()[: 12 - len(report.plan.kept["4.conv1.weight"][0])]
    gone = set(range(12)) - set(report.plan.kept["4.conv1.weight"][0].tolist())
    assert gone == set(lowest.tolist())
    assert gone


def test_gradient_scores_of_the_host_see_the_gradients():
    model, inputs = build("vgg"), images()
    model(inputs).square().sum().backward()
    report = shrink(model, inputs, tp.importance.GroupTaylorImportance(), sparsity=0.3)
    assert report.parameters.sparsity >= 0.3


def test_our_importances_work_in_the_hosts_pruner():
    model, inputs = build("resnet"), images()
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=RowNorm(), pruning_ratio=0.5, ignored_layers=[model[7]]
    )
    pruner.step()
    assert model[0].out_channels == 4
    assert model(inputs).shape == (2, 5)


def test_wrappers_are_looked_through_and_distributed_ones_refused():
    inputs = images()
    model = build("vgg")
    wrapped = nn.DataParallel(model)
    shrink(wrapped, inputs, RowNorm(), sparsity=0.3)
    assert model[0].out_channels < 6 or model[3].out_channels < 8 or model[7].out_features < 10

    class FullyShardedDataParallel(nn.Module):
        """Stands for the wrapper that replaces parameters by flat ones."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(ParameterError, match="before it is wrapped for distributed training"):
        shrink(FullyShardedDataParallel(build("vgg")), inputs, RowNorm(), sparsity=0.3)


def test_what_cannot_be_reached_changes_nothing():
    model, inputs = build("resnet"), images()
    with unchanged(model), pytest.raises(ArgumentError, match="a sparsity of at most"):
        shrink(model, inputs, RowNorm(), sparsity=0.99, steps=4)
    with unchanged(model), pytest.raises(ArgumentError, match="at most 0 in params"):
        shrink(model, inputs, Fixed({}), sparsity=0.1)


class Moody(RowNorm):
    """Fails in the middle of the second step."""

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        found = super().score(group, model)
        if self.calls.count(group.name) == 2:
            raise RuntimeError("no")
        return found


def test_a_failure_in_a_later_step_undoes_the_earlier_ones():
    model, inputs = build("resnet"), images()
    model.train()
    optimizer = torch.optim.Adam(model.parameters())
    model(inputs).sum().backward()
    optimizer.step()
    sizes = str(model)
    with unchanged(model, optimizer), pytest.raises(RuntimeError, match="no"):
        shrink(model, inputs, Moody(), sparsity=0.4, steps=3, optimizer=optimizer)
    assert str(model) == sizes


def test_a_failure_of_the_averages_undoes_everything():
    model, inputs = build("vgg"), images()
    with unchanged(model), pytest.raises(TorchPruneBayesError):
        shrink(model, inputs, RowNorm(), sparsity=0.4, ema=[build("vgg"), build("resnet")])


def wrong_groups() -> list[UnitGroup]:
    """A norm's scales are shifted by one against the channels."""
    right = torch.arange(6)[:, None]
    slices = (
        UnitSlice("0.weight", 0, right, "producer"),
        UnitSlice("0.bias", 0, right, "producer"),
        *(
            UnitSlice(f"1.{name}", 0, right.roll(1), "norm")
            for name in ("weight", "bias", "running_mean", "running_var")
        ),
        UnitSlice("3.weight", 1, right, "consumer"),
    )
    return [UnitGroup("0", "channel", 6, slices)]


def test_a_wrongly_wired_model_is_found_out():
    model, inputs = build("vgg"), images()
    with unchanged(model), pytest.raises(NumericalError, match="its wiring is not understood"):
        shrink(model, inputs, RowNorm(), sparsity=0.3, target="channels", groups=wrong_groups())
    broken = [UnitGroup("0", "channel", 6, wrong_groups()[0].slices[:2])]
    with unchanged(model), pytest.raises(ParameterError, match="to run on the example inputs"):
        shrink(model, inputs, RowNorm(), sparsity=0.3, target="channels", groups=broken)


def test_success_leaves_modes_gradients_and_generators_alone():
    model, inputs = nn.Sequential(build("resnet"), nn.Dropout(0.5)), images()
    model.train()
    model[0][3].bn1.eval()
    model[0][7].bias.requires_grad_(False)
    model(inputs).sum().backward()
    statistics = model[0][1].running_mean.clone()
    modes = [module.training for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    report = shrink(model, inputs, RowNorm(), sparsity=0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert torch.equal(model[0][1].running_mean, report.plan.cut("0.1.running_mean", statistics))
    assert all(
        parameter.grad is not None and parameter.grad.shape == parameter.shape
        for parameter in model.parameters()
        if parameter.requires_grad
    )


def test_ignored_layers_stay_whole():
    model, inputs = build("resnet"), images()
    report = shrink(model, inputs, RowNorm(), sparsity=0.2, ignored=[model[4], "0"])
    assert [group.name for group in report.groups] == ["3.conv1"]
    assert model[0].out_channels == 8


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sparsity": 1.0}, ArgumentError, r"`sparsity` in \[0, 1\)"),
    ({"sparsity": None}, ArgumentTypeError, "`sparsity` to be a number"),
    ({"target": "weights"}, ArgumentError, "`target` to be one of"),
    ({"allocation": "block"}, ArgumentError, "`allocation` to be one of"),
    ({"steps": 0}, ArgumentError, "`steps` of at least 1"),
    ({"steps": [0.2, 0.1, 0.3]}, ArgumentError, "`steps` to rise to the sparsity"),
    ({"steps": [0.2]}, ArgumentError, "`steps` to rise to the sparsity"),
    ({"min_keep": 0}, ArgumentError, "`min_keep` of at least 1"),
    ({"round_to": 0}, ArgumentError, "`round_to` of at least 1"),
    ({"ignored": ["nowhere"]}, ArgumentError, "to ignore, got 'nowhere'"),
    ({"importance": RowNorm}, ArgumentTypeError, "`importance` to be a UnitImportance"),
    ({"importance": "l1"}, ArgumentTypeError, "`importance` to be a UnitImportance"),
    ({"example_inputs": None}, ArgumentError, "`example_inputs` to verify with"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_impossible_arguments_are_refused(arguments, error, message):
    model = build("vgg")
    given = {"example_inputs": images(), "importance": RowNorm(), "sparsity": 0.3, **arguments}
    with unchanged(model), pytest.raises(error, match=message):
        shrink(model, **given)


def test_the_report_reads_as_a_table():
    model, inputs = build("vgg"), images()
    text = str(shrink(model, inputs, RowNorm(), sparsity=0.3))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["parameters", "FLOPs", "units"]
    assert "masked and shrunk outputs differ by at most" in lines[3]
    assert [line.split()[:2] for line in lines[4:]] == [
        ["0", "channel"],
        ["3", "channel"],
        ["7", "hidden"],
    ]


def test_nothing_asked_nothing_done():
    model, inputs = build("vgg"), images()
    with unchanged(model):
        report = shrink(model, inputs, RowNorm(), sparsity=0.0)
    assert (report.steps, report.plan.kept, report.difference) == (0, {}, 0.0)


def test_the_former_name_of_allocation_works_and_says_so():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.warns(DeprecationWarning, match="`scope` is now `allocation`"):
        report = shrink(
            model,
            torch.randn(3, 4),
            RowNorm(),
            sparsity=0.5,
            target="channels",
            scope="layer",
        )
    assert report.units.after == 4


@pytest.mark.parametrize("known", [False, True])
def test_inputs_that_the_model_does_not_take_are_blamed(known):
    model = build("vgg")
    groups = find_groups(model, images()) if known else None
    wrong = torch.zeros(2, 4, 16, 16)
    with unchanged(model), pytest.raises(ArgumentError, match="run on `example_inputs`, got Run"):
        shrink(model, wrong, RowNorm(), sparsity=0.3, groups=groups)


def test_gates_that_are_still_attached_are_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    importance = BMRSImportance(attach_gates(model))
    for option in ({"target": "evidence"}, {"sparsity": 0.3, "target": "channels"}):
        with unchanged(model), pytest.raises(ParameterError, match="call `fold_gates` first"):
            shrink(model, torch.ones(2, 4), importance, **option)


def test_an_evidence_without_units_to_speak_of_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with (
        unchanged(model),
        pytest.raises(ArgumentError, match=r"got none in Sequential.*native_layer_norm"),
    ):
        shrink(model, torch.ones(2, 4), Fixed({}), target="evidence")
