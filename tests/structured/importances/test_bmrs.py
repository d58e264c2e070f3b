"""Gates as an importance: joint evidence of coupled units, and cuts that change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.gates.cases import FAMILIES, Logits, built, scatter
from torchprune_bayes import Calibration
from torchprune_bayes.errors import AlignmentError
from torchprune_bayes.gates import Gates, attach_gates, find_criterion, fold_gates
from torchprune_bayes.structured import shrink
from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
from torchprune_bayes.structured.importances.bmrs import BMRSImportance
from torchprune_bayes.structured.slicing import apply_plan, groups_after, plan_of


def each(units: int, per_unit: int = 1) -> torch.Tensor:
    return torch.arange(units * per_unit).view(units, per_unit)


class Residual(nn.Module):
    """Two convolutions that write to one stream, and one that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        self.block, self.block_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_norm(self.stem(x))
        x = x + self.block_norm(self.block(x))
        return self.head(x.mean((2, 3)))


def stream() -> UnitGroup:
    pieces = []
    for layer in ("stem", "block"):
        pieces += [
            UnitSlice(f"{layer}.{name}", 0, each(4), "producer") for name in ("weight", "bias")
        ]
        for name in ("weight", "bias", "running_mean", "running_var"):
            pieces.append(UnitSlice(f"{layer}_norm.{name}", 0, each(4), "norm"))
    readers = [UnitSlice(f"{layer}.weight", 1, each(4), "consumer") for layer in ("block", "head")]
    return UnitGroup("stem", "channel", 4, (*pieces, *readers))


@torch.no_grad()
def residual_gates() -> tuple[Residual, Gates]:
    torch.manual_seed(0)
    model = Residual().eval()
    gates = attach_gates(model, ["*_norm"])
    # Both keep 0 and close 1; one would close 2 and the other 3, where the sum decides.
    for name, mu, log_sigma in (
        ("stem_norm", [0.0, -18.0, -20.0, -3.0], [-5.0, 1.0, -3.0, 0.5]),
        ("block_norm", [0.0, -18.0, -9.0, -20.0], [-5.0, 1.0, 1.6, 1.0]),
    ):
        gates[name].mu.copy_(torch.tensor(mu))
        gates[name].log_sigma.copy_(torch.tensor(log_sigma))
    return model, gates


@pytest.mark.parametrize("criterion", ["bmrs-n", "bmrs-u8"])
def test_the_evidence_of_a_stream_is_the_sum_over_what_writes_to_it(criterion):
    model, gates = residual_gates()
    score = BMRSImportance(gates, criterion).score(stream(), model)
    margins = gates.margins(criterion)
    assert score is not None
    torch.testing.assert_close(score, -(margins["stem_norm"] + margins["block_norm"]))
    assert (score < 0).tolist() == [False, True, True, False]
    assert float(margins["stem_norm"][3]) < 0 < float(margins["block_norm"][3])
    if criterion == "bmrs-n":
        assert float(margins["block_norm"][2]) < 0 < float(margins["stem_norm"][2])


def test_criteria_that_do_not_add_up_need_every_gate():
    model, gates = residual_gates()
    score = BMRSImportance(gates, "snr").score(stream(), model)
    margins = gates.margins("snr")
    expected = -torch.stack(list(margins.values())).amin(0)
    assert score is not None
    torch.testing.assert_close(score, expected)


def test_closed_gates_cost_nothing_more():
    model, gates = residual_gates()
    gates["stem_norm"].close(torch.tensor([True, False, False, True]))
    gates["block_norm"].close(torch.tensor([True, False, False, False]))
    score = BMRSImportance(gates).score(stream(), model)
    margins = gates.margins()
    assert score is not None
    assert score[0] == -torch.finfo(torch.float64).max
    assert score[3] == -margins["block_norm"][3]
    assert score[1] == -(margins["stem_norm"][1] + margins["block_norm"][1])


def test_a_group_that_gates_hold_in_part_stays_whole():
    model, _ = residual_gates()
    other = Residual()
    gates = attach_gates(other, ["stem_norm"])
    assert BMRSImportance(gates).score(stream(), other) is None
    unknown = UnitGroup("x", "hidden", 2, (UnitSlice("x.weight", 0, each(2), "producer"),))
    assert BMRSImportance(residual_gates()[1]).score(unknown, model) is None


def test_flattened_maps_belong_to_their_channel():
    model, _ = built("lenet")
    gates = attach_gates(model)
    scatter(gates, closed=False)
    group = UnitGroup(
        "conv2",
        "channel",
        4,
        (
            UnitSlice("conv2.weight", 0, each(4), "producer"),
            UnitSlice("fc1.weight", 1, each(4, 4), "consumer"),
        ),
    )
    score = BMRSImportance(gates).score(group, model)
    assert score is not None
    torch.testing.assert_close(score, -gates.margins()["conv2"])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_closed_is_cut_out_and_the_output_stays(family):
    model, x = built(family)
    gates = attach_gates(model)
    scatter(gates)
    before = model(x)
    importance = BMRSImportance(gates, criterion=None)
    closed, units = gates.closed, gates.units
    fold_gates(model)
    inner = model.model if isinstance(model, Logits) else model
    if inner is not model:  # the families know the model, not what it is wrapped in
        importance = unwrapped(importance)
    inputs = {"input_ids": x} if x.dtype == torch.long else x
    report = shrink(inner, inputs, importance, target="evidence")
    assert report.units.before - report.units.after == closed > 0
    assert sum(change.units.before for change in report.groups) >= units
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def unwrapped(importance: BMRSImportance) -> BMRSImportance:
    importance._taken = {
        (name.removeprefix("model."), dim): decision
        for (name, dim), decision in importance._taken.items()
    }
    return importance


def test_residual_streams_shrink_where_all_gates_together_say_so():
    model, x = built("timm-resnet18")
    gates = attach_gates(model, residual=True)
    scatter(gates, closed=False)
    with torch.no_grad():  # the first stage's stream loses its channels 3 and 5
        for name in ("bn1", "layer1.0.bn2", "layer1.1.bn2"):
            gates[name].mu[[3, 5]] = -20.0
    importance = BMRSImportance(gates)
    fold_gates(model)
    report = shrink(model, x, importance, target="evidence")
    left = {change.name: change.units.after for change in report.groups}
    assert model.layer1[0].conv2.out_channels == model.conv1.out_channels == 62
    assert 62 in left.values()
    assert report.difference is not None
    assert report.difference < 1e-5


def calibrated(model: nn.Module, shape: torch.Size) -> Calibration:
    """Sixty-four inputs with the classes that the model gives them."""
    x = torch.randn(64, *shape[1:], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return Calibration(model, [(x, model(x).argmax(1))], cross_entropy)


@pytest.mark.parametrize("family", ["mlp", "lenet", "vgg", "timm-vit"])
def test_what_gates_rank_lowest_is_made_up_for(family):
    model, x = built(family)
    gates = attach_gates(model)
    scatter(gates, closed=False)
    importance = BMRSImportance(gates)
    fold_gates(model)
    plain = copy.deepcopy(model)
    cut = shrink(plain, x, importance, sparsity=0.4, target="channels")
    calibration = calibrated(model, x.shape)
    report = shrink(model, x, importance, sparsity=0.4, target="channels", calibration=calibration)
    assert report.groups == cut.groups
    [repaired] = report.repairs
    assert not cut.repairs
    assert repaired.taken
    assert repaired.loss_repaired < repaired.loss_cut


def test_what_gates_have_closed_needs_no_making_up_for():
    model, x = built("lenet")
    gates = attach_gates(model)
    scatter(gates)
    importance = BMRSImportance(gates, criterion=None)
    fold_gates(model)
    before = model(x)
    calibration = calibrated(model, x.shape)
    report = shrink(model, x, importance, target="evidence", calibration=calibration)
    [repaired] = report.repairs
    assert report.units.after < report.units.before
    assert repaired.loss_cut == pytest.approx(repaired.loss_repaired, abs=1e-6)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_scores_follow_the_cut_and_start_anew_with_the_next_call():
    model, gates = residual_gates()
    importance = BMRSImportance(gates)
    groups, kept = [stream()], {"stem": torch.tensor([0, 2, 3])}
    fold_gates(model)
    before = importance.score(groups[0], model)
    assert before is not None
    importance.update(model, groups, kept)
    plan = plan_of(model, groups, kept)
    apply_plan(model, plan)
    after = importance.score(groups_after(groups, plan, kept)[0], model)
    assert after is not None
    assert torch.equal(after, before[[0, 2, 3]])
    with pytest.raises(AlignmentError, match="Expected 3 gated units at `stem_norm`, got 4"):
        importance.score(groups[0], model)
    importance.prepare(model, groups)
    found = importance.score(groups[0], model)
    assert found is not None
    assert torch.equal(found, before)


def test_verdicts_are_taken_once():
    model, gates = residual_gates()
    importance = BMRSImportance(gates, find_criterion("bmrs-u4"))
    before = importance.score(stream(), model)
    with torch.no_grad():
        gates["stem_norm"].mu.zero_()
    after = importance.score(stream(), model)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_the_hosts_own_pruner_takes_it():
    tp = pytest.importorskip("torch_pruning")
    model, x = built("vgg")
    gates = attach_gates(model)
    scatter(gates, closed=False)
    order = {name: margins.argsort() for name, margins in gates.margins().items()}
    importance = BMRSImportance(gates)
    fold_gates(model)
    filters = {name: model[int(name) - 1].weight.detach().clone() for name in order}
    pruner = tp.pruner.BasePruner(
        model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[model[8]]
    )
    pruner.step()
    assert model(x).shape == (2, 3)
    # torch-pruning takes half of 4 and 5 channels, rounded up; the smallest margins stay.
    first = order["1"][:2].sort().values
    second = order["4"][: model[3].out_channels].sort().values
    assert torch.equal(model[0].weight, filters["1"][first])
    assert torch.equal(model[3].weight, filters["4"][second][:, first])
