"""The Fisher of gates on readers, against gates that are really there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from tests.structured.models import SMALL, build, images
from torchprune_bayes import Calibration
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.structured import ConsumerGateFisherImportance, find_groups
from torchprune_bayes.structured.groups import UnitGroup


def by_gates(model: nn.Module, group: UnitGroup, x: Tensor, y: Tensor) -> Tensor:
    """``½ mean_n (∂ℓ_n/∂c)²`` with a gate ``c`` on everything that reads a unit, one by one."""
    squares = torch.zeros(group.units, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    for n in range(len(x)):
        gates = torch.ones(group.units, dtype=torch.float64, requires_grad=True)
        gated = dict(parameters)
        for piece in group.slices:
            if piece.role == "consumer":
                weight = gated[piece.name]
                scale = torch.ones(weight.shape[piece.dim], dtype=torch.float64)
                flat = gates.repeat_interleave(piece.positions.shape[1])
                scale = scale.index_copy(0, piece.positions.flatten(), flat)
                shape = [1] * weight.dim()
                shape[piece.dim] = -1
                gated[piece.name] = weight * scale.view(shape)
        loss = cross_entropy(functional_call(model, gated, (x[n : n + 1],)), y[n : n + 1])
        [gradient] = torch.autograd.grad(loss, [gates])
        squares += gradient.square()
    return 0.5 * squares / len(x)


@pytest.mark.parametrize("name", SMALL)
def test_scores_are_those_of_gates(name):
    model, x = build(name).double(), images(5).double()
    y = torch.arange(5) % 5
    calibration = Calibration(model, [(x[:3], y[:3]), (x[3:], y[3:])], cross_entropy)
    groups = find_groups(model, x[:1])
    importance = ConsumerGateFisherImportance(calibration)
    with unchanged(model):
        importance.prepare(model, groups)
        scores = {group.name: importance.score(group, model) for group in groups}
    for group in groups:
        torch.testing.assert_close(scores[group.name], by_gates(model, group, x, y))


def test_scores_of_units_that_cancel_are_small():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    y = torch.arange(8) % 2
    calibration = Calibration(model, [(x, y)], cross_entropy)
    importance = ConsumerGateFisherImportance(calibration)
    [group] = find_groups(model, x)
    scores = importance.score(group, model)
    # The first unit adds the same to both logits, which the softmax does not see.
    assert scores is not None
    assert scores[0] == pytest.approx(0.0, abs=1e-20)
    assert scores[1] > 1e-3
    assert importance.joint


def test_it_needs_a_calibration():
    with pytest.raises(ArgumentTypeError, match="Expected a Calibration"):
        ConsumerGateFisherImportance(nn.Linear(2, 2))
