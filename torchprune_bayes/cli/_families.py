"""Families of methods, as in the figure of ``compare``."""

from __future__ import annotations

from collections.abc import Sequence

from torchprune_bayes.cli._experiment import Variant

STEPWISE = "in several steps, new gradients"

_FAMILIES = {
    "optimal brain surgeon": (
        "woodfisher",
        "woodtaylor",
        "cbs",
        "cbs-post-update",
        "greedy-obs",
        "kfac",
    ),
    "layer by layer": ("layerwise", "alps", "sparsegpt", "wanda"),
    "one weight at a time": ("diagonal-fisher", "hessian-diagonal"),
    "Bayesian": ("opd", "laplace-evidence"),
    "made for before training": (
        "snip",
        "iterative-snip",
        "snip-it",
        "grasp",
        "synflow",
        "force",
    ),
    "without data": ("magnitude", "layer-magnitude", "random"),
}
_OTHER = "others"


def families_of(compared: Sequence[Variant]) -> dict[str, str]:
    """The family of each row of the comparison.

    Example:
        >>> families_of([Variant("opd", "opd"), Variant("w, 8 steps", "w", {"steps": 8})])
        {'opd': 'Bayesian', 'w, 8 steps': 'in several steps, new gradients'}
    """
    by_method = {name: family for family, names in _FAMILIES.items() for name in names}
    return {
        variant.label: STEPWISE if ", " in variant.label else by_method.get(variant.method, _OTHER)
        for variant in compared
    }
