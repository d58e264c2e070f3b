"""How a model is shrunk: importance, allocation between groups, and repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice, check_count
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.structured.allocation import (
    ALLOCATIONS,
    Allocation,
    isomorphic_ranks,
    per_price,
    unit_prices,
)
from torchprune_bayes.structured.curves import LossCurve, measure_curves
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.ranking import Ranking, rank_units
from torchprune_bayes.structured.unit_costs import Costs, Resource

if TYPE_CHECKING:
    from torchprune_bayes.structured.importance import UnitImportance

Repairing: TypeAlias = Literal["auto", "least_squares", "none"]


def check_recipe(
    allocation: Allocation | None = None,
    repair: Repairing = "auto",
    evaluations: int = 1,
    min_keep: int = 1,
    round_to: int = 1,
) -> None:
    """Check options of ``shrink`` that need no model.

    Raises:
        ArgumentError: If one has an impossible value.
        ArgumentTypeError: If a number is none.
    """
    check_choice("repair", repair, get_args(Repairing))
    if allocation is not None:
        check_choice("allocation", allocation, ALLOCATIONS)
    check_count("evaluations", evaluations)
    check_count("min_keep", min_keep)
    check_count("round_to", round_to)


@dataclass(frozen=True)
class Recipe:
    """All choices except the amount to remove.

    Attributes:
        importance: Scores the units.
        calibration: Data for curves and repair, ``None`` if there are none.
        allocation: How units of different groups are compared.
        repair: How the consumer layers are re-fit.
        evaluations: Total number of points of all measured curves.
        min_keep: Units that every group keeps.
        round_to: Multiple for the units left in a group that loses some.
    """

    importance: UnitImportance
    calibration: Calibration | None
    allocation: Allocation
    repair: Repairing
    evaluations: int
    min_keep: int
    round_to: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        importance: UnitImportance | Calibration | Any,
        calibration: Calibration | None,
        allocation: Allocation | None,
        repair: Repairing,
        *,
        evaluations: int,
        min_keep: int,
        round_to: int,
    ) -> Recipe:
        """Fill in defaults.

        Raises:
            ArgumentError: If an option is impossible, or needs a calibration that is missing.
            ArgumentTypeError: If neither an importance nor a calibration is given.
            AlignmentError: If the calibration belongs to another model.
        """
        from torchprune_bayes.structured._torch_pruning_importance import as_unit_importance
        from torchprune_bayes.structured.importances import ConsumerGateFisherImportance

        check_recipe(allocation, repair, evaluations, min_keep, round_to)
        if calibration is not None and not isinstance(calibration, Calibration):
            raise ArgumentTypeError(f"Expected a Calibration, got {type(calibration).__name__}.")
        if isinstance(importance, Calibration):
            calibration = importance if calibration is None else calibration
            importance = ConsumerGateFisherImportance(importance)
            allocation = allocation or "measured"
        scorer = as_unit_importance(importance)
        held = getattr(scorer, "calibration", None)
        if calibration is None and isinstance(held, Calibration):
            calibration = held
        if calibration is not None and calibration.model is not model:
            raise AlignmentError(
                "Expected to shrink the model of the calibration, got another one: build the "
                "calibration on this one."
            )
        for name, value in (("allocation", allocation), ("repair", repair)):
            if calibration is None and value in ("measured", "least_squares"):
                raise ArgumentError(
                    f"Expected a calibration for {name}={value!r}, got none: pass "
                    "`calibration=Calibration(model, data, loss_fn)`."
                )
        return cls(
            scorer, calibration, allocation or "global", repair, evaluations, min_keep, round_to
        )

    def ranking(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        scores: Mapping[str, Tensor],
        costs: Costs,
        resource: Resource | None,
        step: int,
    ) -> tuple[Ranking, list[LossCurve]]:
        """Rank all units together, and return the curves measured for it.

        Args:
            model: The present model.
            groups: Its groups.
            scores: Scores by the name of the group.
            costs: Costs of the model at the start.
            resource: Resource that prices units; ``None`` compares the scores themselves.
            step: Number of earlier steps; later ones draw other samples.
        """
        curves: list[LossCurve] = []
        values: Mapping[str, Tensor] | None = None
        if self.allocation == "measured" and self.calibration is not None:
            curves = measure_curves(
                self.calibration.redrawn(step),
                groups,
                {name: score.argsort(stable=True) for name, score in scores.items()},
                evaluations=self.evaluations,
                min_keep=self.min_keep,
            )
            values = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
            values |= {curve.group: curve.slopes() for curve in curves}
        elif self.allocation == "isomorphic":
            ranks = isomorphic_ranks(model, groups, scores)
            values = {name: rank.sort().values for name, rank in ranks.items()}
        elif self.allocation == "global" and self.importance.joint:
            values = {name: score.cpu().double().sort().values for name, score in scores.items()}
        if values is not None and self.allocation != "isomorphic" and resource is not None:
            values = per_price(values, unit_prices(costs, groups, resource))
        ranking = rank_units(
            groups,
            scores,
            values=values,
            scope="layer" if self.allocation == "layer" else "global",
            min_keep=self.min_keep,
            round_to=self.round_to,
        )
        return ranking, curves
