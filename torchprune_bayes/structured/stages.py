"""Shrinking a model in stages, between which it trains: the sparsity due of the remaining model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchprune_bayes._checks import check_fraction
from torchprune_bayes.structured._report import ShrinkReport


@dataclass
class Stages:
    """Tracks the remaining fraction of the whole model over several calls of ``shrink``.

    ``shrink`` takes a sparsity of the model that it is given. A schedule refers to the model at the
    start. With ``"channels"`` a group that is down to one unit does not count any more, so
    that slightly less than the due amount may be removed.

    Attributes:
        left: Fraction of the target, of the model at the start, that remains.

    Example:
        >>> stages = Stages(left=0.8)
        >>> round(stages.due(0.5), 4)  # three of eight parts, so that five of ten are left
        0.375
        >>> stages.due(0.2) is None
        True
    """

    left: float = 1.0
    _whole: float = field(default=0.0, init=False, repr=False)

    def due(self, sparsity: float) -> float | None:
        """Return the sparsity, of the model as it is, that leads to one of the whole.

        Args:
            sparsity: Fraction of the model at the start to remove.

        Returns:
            ``None`` if that much is removed already.
        """
        check_fraction("sparsity", sparsity, closed=False)
        wanted = 1.0 - (1.0 - sparsity) / self.left
        return wanted if wanted > 1e-9 else None

    def count(self, report: ShrinkReport) -> None:
        """Record what a call of ``shrink`` has removed."""
        amounts = {"params": report.parameters, "flops": report.flops, "channels": report.units}
        amount = amounts.get(report.target, report.measured)
        if amount is not None and amount.before:
            self._whole = self._whole or amount.before / self.left
            self.left -= (amount.before - amount.after) / self._whole
