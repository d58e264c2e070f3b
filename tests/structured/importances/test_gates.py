"""Posterior damage and evidence of a unit as a whole, against gates on all that reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from tests.references.node_sensitivity import (
    GatedFlat,
    GatedResidual,
    explicit_gate_squares,
    gate_evidence,
)
from tests.structured.models import build, images, unsettled
from torchprune_bayes import Calibration
from torchprune_bayes.curvature import trainable_parameters
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.laplace import Posterior, fit_posterior
from torchprune_bayes.structured import (
    LaplaceEvidenceImportance,
    OPDImportance,
    UnitGroup,
    WoodFisherImportance,
    find_groups,
)
from torchprune_bayes.structured.importances.laplace_evidence import _change_of_gate

OPTIONS: dict[str, Any] = {"num_data": 300, "loss_scale": 1.5, "temperature": 0.5, "kind": "ggn"}


def made(kind: type[nn.Module], size: int) -> tuple[nn.Module, Tensor, Tensor, list[UnitGroup]]:
    model = unsettled(kind()).double().eval()
    x = images(6, size).double()
    return model, x, torch.arange(6) % 3, find_groups(model, x[:1])


def calibrated(model: nn.Module, x: Tensor, y: Tensor) -> Calibration:
    return Calibration(model, [(x, y)], cross_entropy, params=trainable_parameters(model))


def precisions_by_hand(
    model: nn.Module, x: Tensor, y: Tensor, groups: list[UnitGroup], posterior: Posterior
) -> dict[str, tuple[Tensor, Tensor]]:
    squares = explicit_gate_squares(model, {g.name: g.units for g in groups}, cross_entropy, x, y)
    scale = OPTIONS["num_data"] * OPTIONS["loss_scale"] ** 2 / OPTIONS["temperature"]
    found = {}
    for group in groups:
        prior = torch.zeros(group.units, dtype=torch.float64)
        for piece in group.slices:
            if piece.role == "consumer":
                weight = model.get_parameter(piece.name).detach()
                entries = posterior.prior.values(piece.name) * weight.square()
                lines = entries.movedim(piece.dim, 0).flatten(1).sum(1)
                prior += torch.stack([lines[own].sum() for own in piece.positions])
        found[group.name] = scale * squares[group.name], prior
    return found


@pytest.mark.parametrize(("kind", "size"), [(GatedResidual, 6), (GatedFlat, 5)])
def test_damage_and_evidence_are_those_of_explicit_gates(kind, size):
    model, x, y, groups = made(kind, size)
    fitted = fit_posterior(calibrated(model, x, y), **OPTIONS).with_best_prior("layerwise")
    expected = precisions_by_hand(model, x, y, groups, fitted)
    scored = {
        mode: OPDImportance(calibrated(model, x, y), members="gate", mode=mode, **OPTIONS)
        for mode in ("opd", "obd")
    }
    evidence = LaplaceEvidenceImportance(
        calibrated(model, x, y), members="gate", tau=0.25, **OPTIONS
    )
    with unchanged(model):
        for importance in (*scored.values(), evidence):
            importance.prepare(model, groups)
    for group in groups:
        data, prior = expected[group.name]
        torch.testing.assert_close(scored["opd"].score(group, model), 0.5 * (data + prior))
        torch.testing.assert_close(scored["obd"].score(group, model), 0.5 * data)
        whole = data + prior
        by_hand = 0.5 * whole - 0.5 * (whole / prior).log() - 0.25
        torch.testing.assert_close(evidence.score(group, model), by_hand)
    assert scored["opd"].joint


@given(st.floats(0.01, 50.0), st.floats(0.01, 5.0))
def test_the_evidence_of_a_gate_is_an_integral(data: float, prior: float) -> None:
    found = _change_of_gate(torch.tensor([data]).double(), torch.tensor([prior]).double())
    assert float(found) == pytest.approx(-gate_evidence(data, prior), abs=1e-6)


def test_a_unit_that_nothing_reads_with_any_weight_is_neither_for_nor_against():
    empty = torch.zeros(1, dtype=torch.float64)
    assert float(_change_of_gate(empty, empty)) == 0.0


def test_gates_need_a_calibration_and_a_mode_that_they_have():
    posterior = Posterior({"weight": torch.ones(1, 2)}, {"weight": torch.ones(1, 2)})
    for kind in (OPDImportance, LaplaceEvidenceImportance):
        with pytest.raises(ArgumentError, match="Expected a calibration for members='gate'"):
            kind(posterior, members="gate")
    model, x, y, _ = made(GatedFlat, 5)
    with pytest.raises(ArgumentError, match="Expected mode='opd' or 'obd'"):
        OPDImportance(calibrated(model, x, y), members="gate", mode="posterior")


@pytest.mark.parametrize("kind", [OPDImportance, LaplaceEvidenceImportance])
def test_torch_prunings_pruner_takes_gates_one_pass_for_all_groups(kind):
    model, x = build("vgg"), images(8)
    calibration = Calibration(model, [(x, torch.arange(8) % 5)], cross_entropy)
    importance = kind(calibration, members="gate")
    times = []
    whole = importance.prepare
    importance.prepare = lambda *args: (times.append(len(args[1])), whole(*args))[1]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    tp.pruner.BasePruner(
        model, x[:1], importance=importance, pruning_ratio=0.5, ignored_layers=[last]
    ).step()
    assert len(times) < 3
    assert times[0] > 1
    assert model(x).shape == (8, 5)


@pytest.mark.parametrize("block_size", ["full", "unit"])
def test_woodfisher_of_columns_is_joint_over_all_that_reads_a_unit(block_size):
    model, x, y, groups = made(GatedResidual, 6)
    importance = WoodFisherImportance(
        calibrated(model, x, y), block_size=block_size, members="columns", damping=1e-12
    )
    importance.prepare(model, groups)
    squares = explicit_gate_squares(model, {g.name: g.units for g in groups}, cross_entropy, x, y)
    for group in groups:
        found = importance.score(group, model)
        assert found is not None
        if block_size == "unit":
            torch.testing.assert_close(found, 0.5 * squares[group.name], rtol=1e-5, atol=1e-9)
        else:  # the others make up for it
            assert bool((found <= 0.5 * squares[group.name] + 1e-9).all())
    assert importance.joint == (block_size == "unit")
    assert not WoodFisherImportance(calibrated(model, x, y), block_size=16, members="columns").joint
