"""Checks of the combinations of options and curvature of the OBS methods."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from torchprune_bayes._checks import check_choice, check_count, check_fraction
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.methods.paper_variant import PaperVariant
from torchprune_bayes.types import Masks


def check_steps(
    steps: int, stages: int | str, path: str, curvature: EmpiricalFisher | None
) -> None:
    """Refuse impossible numbers of steps and stages, and steps without new gradients."""
    check_count("steps", steps)
    if stages != "auto":
        check_count("stages", stages)
    check_choice("path", path, ("cubic", "geometric", "linear"))
    if curvature is not None and steps > 1:
        raise ArgumentError(
            f"Expected `calibration=` alone for steps={steps}, because every step takes fresh "
            "gradients, got a fitted curvature."
        )


def check_goes_with_pattern(
    curvature: EmpiricalFisher | None, flops_target: float | None, variant: PaperVariant
) -> None:
    """Refuse options that rank or order single weights."""
    given = {
        "curvature": curvature is not None,
        "flops_target": flops_target is not None,
        "flops_power": bool(variant.flops_power),
        "compat": variant.threshold,
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise ArgumentError(f"Expected no `{name}` with a pattern, got one.")


def check_fitted_to(curvature: EmpiricalFisher, masks: Masks) -> None:
    """Refuse a curvature of other entries than those that are remaining."""
    remaining = curvature.remaining.masks
    fits = list(remaining) == list(masks) and all(
        not curvature.active_only or torch.equal(remaining[name].to(mask.device), mask)
        for name, mask in masks.items()
    )
    if not fits:
        raise AlignmentError(
            "Expected a curvature fitted to the entries that remain now, got one of other "
            "tensors or of an earlier mask: fit it again."
        )


def check_targets(
    amount: float | int | Mapping[str, int] | None, flops_target: float | None, scope: str
) -> None:
    """Refuse none or both of the two ways to say how much to prune."""
    if (amount is None) == (flops_target is None):
        raise ArgumentError(
            "Expected either `amount` or `flops_target` (then amount=None), "
            f"got amount={amount!r} and flops_target={flops_target!r}."
        )
    if flops_target is not None:
        check_fraction("flops_target", flops_target)
        check_choice("scope with flops_target", scope, ("global",))
