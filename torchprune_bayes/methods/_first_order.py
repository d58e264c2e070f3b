"""OBS methods whose update also takes a share of the first-order term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torchprune_bayes._checks import check_fraction
from torchprune_bayes.methods._obs import ObsPruning


class FirstOrderPruning(ObsPruning):
    """:class:`ObsPruning` with the damped natural-gradient step ``η`` of the kept weights.

    Args:
        amount: As of :class:`ObsPruning`.
        gradient_step: ``η``, or ``"auto"``, a line search on held-out loss.
        options: As of :class:`ObsPruning`.
    """

    gradient_grid: ClassVar[tuple[float, ...]]
    """What ``"auto"`` chooses from, in rising order, with zero."""

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None = None,
        *,
        gradient_step: float | str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(amount, **options)
        if gradient_step != "auto":
            check_fraction("gradient_step", gradient_step)
        self.gradient_step = gradient_step

    def gradient_steps(self) -> tuple[float, ...]:
        """Values of ``η`` to choose from."""
        if isinstance(self.gradient_step, str):
            return self.gradient_grid
        return (float(self.gradient_step),)
