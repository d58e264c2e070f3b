"""Criteria by their names in tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torchprune_bayes.gates import Criterion, find_criterion


def named(
    criteria: Iterable[Criterion | str] | Mapping[str, Criterion | str],
) -> dict[str, Criterion]:
    """Look criteria up; criteria without a name are called by their ``repr``.

    Example:
        >>> list(named(["snr", find_criterion("mean")]))
        ['snr', 'PosteriorMean(threshold=0.1)']
    """
    if isinstance(criteria, Mapping):
        return {str(name): find_criterion(criterion) for name, criterion in criteria.items()}
    return {str(criterion): find_criterion(criterion) for criterion in criteria}
