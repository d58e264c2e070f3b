from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.training.gradual_cases import TWICE, Network, all_state, calibration_for, run_of
from torchprune_bayes import (
    WoodFisher,
)
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    ParameterError,
)
from torchprune_bayes.schedules import one_shot
from torchprune_bayes.training import GradualPruner


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amount": 0.5}, ArgumentError, "no `amount`, because the schedule gives it"),
        ({"curvature": None}, ArgumentError, "no `curvature`, because it is fitted anew"),
        ({"mode": "mask"}, ArgumentError, "one of 'zeros', 'hooks', got 'mask'"),
        ({"scope": "block"}, ArgumentError, "one of 'global', 'layer', got 'block'"),
        ({"params": None}, ArgumentTypeError, "`params` or `calibration=`, got neither"),
        ({"method": WoodFisher}, ArgumentTypeError, "for WoodFisher, got none"),
        ({"method": "none"}, ArgumentError, "got 'none'"),
        ({"method": prune.LnStructured}, ArgumentTypeError, "unstructured method"),
        ({"schedule": 0.5}, ArgumentTypeError, "Expected a Schedule .* got 0.5"),
        ({"schedule": {"first.weight": TWICE}}, ArgumentError, "difference in last.weight"),
        (
            {"schedule": {"first.weight": TWICE, "last.weight": TWICE, "x": TWICE}},
            ArgumentError,
            "difference in x",
        ),
        ({"params": nn.ReLU()}, ParameterError, "got none"),
    ],
)
def test_mistakes_show_at_once(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {"params": Network(), "method": "magnitude", "schedule": TWICE}
    with pytest.raises(error, match=message):
        GradualPruner(**good | arguments)


def test_tensors_of_others_are_refused() -> None:
    model, other = Network(), Network()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(AlignmentError, match="parameters of the optimizer"):
        GradualPruner(model, "magnitude", TWICE, optimizer=optimizer)
    with pytest.raises(AlignmentError, match="pass the same list to both"):
        GradualPruner(other, WoodFisher, TWICE, calibration=calibration_for(model))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"extra": 1}, ArgumentError, "Expected the keys history, masks and step"),
        ({"step": -1}, ArgumentError, "`step` of at least 0"),
        ({"masks": {"x": torch.ones(1)}}, AlignmentError, "got 'x'"),
        ({"masks": {"last.weight": torch.ones(1)}}, AlignmentError, r"\(3, 8\) for `last.weight`"),
    ],
)
def test_foreign_state_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    run = run_of(schedule=one_shot(0.5, at=1))
    run.train(0, 1)
    before = [value.clone() for value in all_state(run)]
    with pytest.raises(error, match=message):
        run.pruner.load_state_dict(run.pruner.state_dict() | change)
    assert all(map(torch.equal, before, all_state(run)))
    assert run.pruner.sparsity == 0.5
