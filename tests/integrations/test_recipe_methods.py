"""Recipes offer the methods that they can run."""

from __future__ import annotations

import pytest
from torch import nn

from tests.integrations.scripts import recipe
from torchprune_bayes import Calibration, GradualPruner, one_shot, registered_methods

RECIPES = [("hf", "recipe"), ("timm", "options"), ("accelerate", "prune_digits")]


@pytest.mark.parametrize(("framework", "name"), RECIPES)
def test_every_method_that_is_offered_goes_along_a_schedule(framework: str, name: str) -> None:
    with recipe(framework, name) as module:
        offered = module.METHODS
    assert set(registered_methods()) - set(offered) == {"bmrs"}  # it needs gates
    model = nn.Linear(2, 2)
    for method in offered:
        GradualPruner(None, method, one_shot(0.5), calibration=Calibration(model, []))
