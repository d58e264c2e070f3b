"""L1 norms of filters, and torch-pruning's own importances."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.state import unchanged
from tests.structured.models import SMALL, build, images
from torchprune_bayes.structured import UnitGroup, find_groups, shrink
from torchprune_bayes.structured.importances.magnitude import L1FilterImportance


def test_filters_of_a_stream_are_summed_and_averaged():
    model, inputs = build("resnet"), images()
    groups = {group.name: group for group in find_groups(model, inputs)}
    with unchanged(model):
        stream = L1FilterImportance().score(groups["0"], model)
        inner = L1FilterImportance().score(groups["3.conv1"], model)
    first = model[0].weight.detach().abs().sum((1, 2, 3))
    second = model[3].conv2.weight.detach().abs().sum((1, 2, 3))
    torch.testing.assert_close(stream, ((first + second) / (27 + 72)).double())
    torch.testing.assert_close(inner, model[3].conv1.weight.detach().abs().mean((1, 2, 3)).double())


@pytest.mark.parametrize("name", SMALL)
def test_the_smallest_filters_of_each_layer_go(name):
    model, inputs = build(name), images()
    groups = find_groups(model, inputs)
    scores = {group.name: L1FilterImportance().score(group, model) for group in groups}
    report = shrink(
        model, inputs, L1FilterImportance(), sparsity=0.25, target="channels", allocation="layer"
    )
    gone = 0
    for group in groups:
        piece = next(piece for piece in group.slices if piece.role == "producer")
        kept = report.plan.kept.get(piece.name, {}).get(piece.dim)
        if kept is None:
            continue
        stays = torch.isin(piece.positions[:, 0], kept)
        gone += int((~stays).sum())
        assert float(scores[group.name][~stays].max()) <= float(scores[group.name][stays].min())
    assert gone == report.units.before - report.units.after > 0


def test_without_a_kernel_there_is_nothing_to_say():
    assert L1FilterImportance().score(UnitGroup("0", "channel", 4, ()), build("vgg")) is None


def test_an_importance_of_the_host_passes_through():
    tp = pytest.importorskip("torch_pruning")
    model, inputs = build("resnet"), images()
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    before = {group.name: group.units for group in find_groups(model, inputs)}
    report = shrink(model, inputs, importance, sparsity=0.5, target="channels", allocation="layer")
    assert report.units.before == sum(before.values())
    assert all(change.units.after == change.units.before // 2 for change in report.groups)
    graph = tp.DependencyGraph().build_dependency(build("resnet"), (inputs,))
    group = graph.get_pruning_group(
        graph.model[3].conv1, tp.prune_conv_out_channels, list(range(8))
    )
    best = importance(group).topk(4).indices.sort().values
    assert torch.equal(report.plan.kept["3.conv1.weight"][0], best)
