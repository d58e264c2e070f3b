"""What a training will ask of ``shrink`` later is checked before it."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn

from torchprune_bayes import Calibration
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.structured import L1FilterImportance
from torchprune_bayes.structured.option_checks import check_later_call


def importance(model: nn.Module) -> L1FilterImportance:
    return L1FilterImportance()


@pytest.mark.parametrize(
    "option",
    [
        {"sparsity": 1.0},
        {"sparsity": 0.5, "steps": [0.5, 0.4]},
        {"target": "time"},
        {"target": "evidence", "sparsity": 0.5},
        {"allocation": "mesured"},
        {"repair": "yes"},
        {"evaluations": 0},
        {"round_to": 0},
        {"min_keep": -1},
    ],
)
def test_impossible_values_are_refused(option: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match="Expected"):
        check_later_call(importance, option)


@pytest.mark.parametrize("name", ["sparsty", "optimizer", "importance"])
def test_options_that_there_are_not_are_named(name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"options of `shrink`, got `{name}`"):
        check_later_call(importance, {"sparsity": 0.5, name: 1})


def test_importances_themselves_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    calibration = Calibration(
        model, [(torch.zeros(2, 4), torch.zeros(2).long())], nn.CrossEntropyLoss()
    )
    for given in (calibration, L1FilterImportance(), tp.importance.MagnitudeImportance(), 3):
        with pytest.raises(ArgumentTypeError, match="function of the model"):
            check_later_call(given, {"sparsity": 0.5})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.5, "steps": [0.2, 0.5], "target": "flops", "allocation": "measured"},
        {"steps": 3, "ignored": ["head"], "verify": False, "heads": "either"},
        {"target": "evidence"},
    ],
)
def test_what_can_be_asked_for_passes(options: dict[str, object]) -> None:
    check_later_call(importance, options)
