"""All importances in torch-pruning's own pruners: called alike, following cuts, regularising."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError
from torchprune_bayes.laplace import Posterior, fit_posterior
from torchprune_bayes.structured import (
    L1FilterImportance,
    LaplaceEvidenceImportance,
    OPDImportance,
    RandomImportance,
    SNAPitImportance,
    UnitImportance,
    WoodFisherImportance,
    shrink,
)

tp = pytest.importorskip("torch_pruning")

CALIBRATED: dict[str, Callable[..., UnitImportance]] = {
    "snapit": SNAPitImportance,
    "woodfisher": WoodFisherImportance,
    "opd": OPDImportance,
    "laplace-evidence": LaplaceEvidenceImportance,
}
POSTERIOR: dict[str, Callable[..., UnitImportance]] = {
    "opd": OPDImportance,
    "laplace-evidence": LaplaceEvidenceImportance,
}
INPUTS = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def calibration(model: nn.Module) -> Calibration:
    return Calibration(model, [(INPUTS, LABELS)], cross_entropy)


def posterior(model: nn.Module) -> Posterior:
    return fit_posterior(calibration(model)).with_best_prior("layerwise")


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    cross_entropy(model(INPUTS), LABELS).backward()
    optimizer.step()


def groups_of(graph: Any, model: Any) -> list[Any]:
    return list(graph.get_all_groups(ignored_layers=[model[-1]]))


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibration_is_all_that_it_takes(name: str) -> None:
    model = network()
    shrink(model, INPUTS[:1], CALIBRATED[name](calibration(model)), sparsity=0.3, steps=2)
    assert model(INPUTS).shape == (24, 4)
    with pytest.raises(ArgumentTypeError, match="Expected a"):
        CALIBRATED[name]("data")


@pytest.mark.parametrize("name", POSTERIOR)
def test_a_posterior_is_told_from_a_calibration(name: str) -> None:
    model = network()
    found = posterior(model)
    group = groups_of(tp.DependencyGraph().build_dependency(model, INPUTS[:1]), model)[0]
    first, second = POSTERIOR[name](found)(group), POSTERIOR[name](posterior=found)(group)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert torch.equal(first, second)
    for arguments in ({}, {"calibration": calibration(model), "posterior": found}):
        with pytest.raises(ArgumentTypeError, match="one of a calibration and a posterior"):
            POSTERIOR[name](**arguments)


@pytest.mark.parametrize("name", CALIBRATED)
def test_scores_are_those_of_the_model_as_it_is_after_a_cut(name: str) -> None:
    model = network()
    importance = CALIBRATED[name](calibration(model))
    graph = tp.DependencyGraph().build_dependency(model, INPUTS[:1])
    assert all(importance(group) is not None for group in groups_of(graph, model))
    graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=[0, 1, 2]).prune()
    for group in groups_of(graph, model):
        found = importance(group)
        draw = calibration(model).redrawn(1)  # the importance has taken the first
        expected = CALIBRATED[name](draw)(group)
        assert isinstance(found, Tensor)
        assert isinstance(expected, Tensor)
        assert len(found) == len(group[0].idxs)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", POSTERIOR)
def test_a_posterior_of_the_model_before_a_cut_is_refused(name: str) -> None:
    model = network()
    importance = POSTERIOR[name](posterior(model))
    graph = tp.DependencyGraph().build_dependency(model, INPUTS[:1])
    assert all(importance(group) is not None for group in groups_of(graph, model))
    graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=[0, 1, 2]).prune()
    with pytest.raises(AlignmentError, match="pass a calibration"):
        [importance(group) for group in groups_of(graph, model)]


def importances(model: nn.Module) -> dict[str, UnitImportance]:
    made = {name: make(calibration(model)) for name, make in CALIBRATED.items()}
    return {**made, "l1": L1FilterImportance(), "random": RandomImportance(seed=0)}


@pytest.mark.parametrize("name", [*CALIBRATED, "l1", "random"])
def test_regularising_pruners(name: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = tp.pruner.GroupNormPruner(
        model, INPUTS[:1], importance=importances(model)[name], pruning_ratio=0.5, reg=0.1
    )
    for _ in range(2):
        train(model, optimizer)
        plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        pruner.update_regularizer()
        pruner.regularize(model)
        found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert not torch.equal(found["0.weight"], plain["0.weight"])
        optimizer.step()


def test_groups_without_scores_are_not_regularised() -> None:
    class Silent(UnitImportance):
        def score(self, group: Any, model: nn.Module) -> Tensor | None:
            return {"0": None, "3": torch.ones(8)}.get(group.name)

    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.01))
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    pruner = tp.pruner.GroupNormPruner(model, INPUTS[:1], importance=Silent(), pruning_ratio=0.5)
    pruner.regularize(model)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, found, plain))
    assert any(Silent()(group) is None for group in groups_of(pruner.DG, model))
