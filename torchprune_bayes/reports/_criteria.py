"""Criteria by the names that they go by in tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torchprune_bayes.gates import Criterion, find_criterion


def named(
    criteria: Iterable[Criterion | str] | Mapping[str, Criterion | str],
) -> dict[str, Criterion]:
    """Look criteria up; those without a name go by what they print.

    Example:
        >>> list(named(["snr", find_criterion("mean")]))
        ['snr', 'PosteriorMean(threshold=0.1)']
    """
    if isinstance(criteria, Mapping):
        return {name: find_criterion(criterion) for name, criterion in criteria.items()}
    return {str(criterion): find_criterion(criterion) for criterion in criteria}
