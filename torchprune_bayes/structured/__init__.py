"""Structured pruning: channels, hidden units and heads are removed.

In plain words: find the units of a model (:func:`find_groups`), let an importance score them, and
:func:`shrink` removes the least important ones and verifies that the smaller model computes what
the whole one computes with the same units zeroed. Importances work in torch-pruning's own pruners
too.

Example:
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    >>> [group] = find_groups(model, torch.zeros(1, 3, 4, 4))
    >>> group.name, group.units
    ('0', 8)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchprune_bayes.structured._cutting import RepairReport
from torchprune_bayes.structured._report import Amount, GroupChange, ShrinkReport
from torchprune_bayes.structured.curves import LossCurve, measure_curves
from torchprune_bayes.structured.groups import AttributeRule, Kept, UnitGroup, UnitSlice
from torchprune_bayes.structured.measured_costs import MeasuredCosts
from torchprune_bayes.structured.optimizer_state import slice_ema, slice_optimizer
from torchprune_bayes.structured.repair import LayerRepair, Repair, repair
from torchprune_bayes.structured.saving import load_shrunk, save_shrunk
from torchprune_bayes.structured.shrink import shrink
from torchprune_bayes.structured.slicing import (
    ShrinkPlan,
    apply_plan,
    groups_after,
    plan_of,
    zero_units,
)
from torchprune_bayes.structured.stages import Stages
from torchprune_bayes.structured.support import check_shrinkable
from torchprune_bayes.structured.torch_pruning_repair import repairing
from torchprune_bayes.structured.tracing import Units, find_groups, find_units
from torchprune_bayes.structured.unit_costs import UnitCosts

__all__ = [
    "Amount",
    "AttributeRule",
    "BMRSImportance",
    "ConsumerGateFisherImportance",
    "GroupChange",
    "Kept",
    "L1FilterImportance",
    "LaplaceEvidenceImportance",
    "LargestWeightImportance",
    "LayerRepair",
    "LossCurve",
    "MeasuredCosts",
    "OPDImportance",
    "RandomImportance",
    "Repair",
    "RepairReport",
    "SNAPitImportance",
    "ShrinkPlan",
    "ShrinkReport",
    "Stages",
    "UnitCosts",
    "UnitGroup",
    "UnitImportance",
    "UnitSlice",
    "Units",
    "WeightsAndUnits",
    "WoodFisherImportance",
    "apply_plan",
    "check_shrinkable",
    "find_groups",
    "find_units",
    "groups_after",
    "halving_path",
    "load_shrunk",
    "measure_curves",
    "plan_of",
    "prune_weights_and_units",
    "repair",
    "repairing",
    "save_shrunk",
    "shrink",
    "slice_ema",
    "slice_optimizer",
    "zero_units",
]

if TYPE_CHECKING:
    from torchprune_bayes.structured.importance import UnitImportance
    from torchprune_bayes.structured.importances import (
        BMRSImportance,
        ConsumerGateFisherImportance,
        L1FilterImportance,
        LaplaceEvidenceImportance,
        LargestWeightImportance,
        OPDImportance,
        RandomImportance,
        SNAPitImportance,
        WoodFisherImportance,
        halving_path,
    )
    from torchprune_bayes.structured.weights_and_units import (
        WeightsAndUnits,
        prune_weights_and_units,
    )

_IMPORTANCES = (
    "BMRSImportance",
    "ConsumerGateFisherImportance",
    "L1FilterImportance",
    "LaplaceEvidenceImportance",
    "LargestWeightImportance",
    "OPDImportance",
    "RandomImportance",
    "SNAPitImportance",
    "WoodFisherImportance",
    "halving_path",
)
_NEEDS_HOST = {
    "WeightsAndUnits": "torchprune_bayes.structured.weights_and_units",
    "prune_weights_and_units": "torchprune_bayes.structured.weights_and_units",
    "UnitImportance": "torchprune_bayes.structured.importance",
    **dict.fromkeys(_IMPORTANCES, "torchprune_bayes.structured.importances"),
}
"""Names whose modules load torch-pruning, which saving and loading do not need."""


def __getattr__(name: str) -> Any:
    if name in _NEEDS_HOST:
        return getattr(import_module(_NEEDS_HOST[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
