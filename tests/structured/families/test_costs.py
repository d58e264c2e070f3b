"""FLOPs of every family, attention with them, before and after a cut."""

from __future__ import annotations

import pytest

from tests.references.flops import flops_without_fused_kernels
from tests.references.masked_twin import random_kept
from tests.structured.families.models import FAMILY_MODELS, build, inputs_of
from torchprune_bayes.structured import find_groups
from torchprune_bayes.structured.slicing import apply_plan, plan_of
from torchprune_bayes.structured.unit_costs import UnitCosts


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_costs_are_those_of_the_matrix_products(name: str) -> None:
    model, inputs = build(name), inputs_of(name)
    groups = find_groups(model, inputs)
    costs = UnitCosts.measure(model, groups, inputs)
    assert set(costs.head_flops) == {group.name for group in groups if group.kind == "head"}
    assert costs.flops({}) == flops_without_fused_kernels(model, **inputs)
    kept = random_kept(groups)
    apply_plan(model, plan_of(model, groups, kept))
    left = {group: len(units) for group, units in kept.items()}
    assert costs.flops(left) == flops_without_fused_kernels(model, **inputs)
