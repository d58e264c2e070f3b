"""Which gates can be closed: five criteria and how their margins become masks.

Every criterion gives a *margin* for each gate, its evidence for closing it: the gate closes where
the margin is zero or more.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchprune_bayes._checks import check_amount, check_count, count_to_prune
from torchprune_bayes._numerics.log_normal import (
    HALF_LOG_2PI,
    TruncatedLogNormal,
    delta_f_normal,
    delta_f_uniform,
)
from torchprune_bayes.errors import ArgumentError

DEFAULT_TAU = HALF_LOG_2PI
"""Evidence that the data may hold against closing a gate that is closed all the same.

The paper's equation 8 is exact with ``tau = 0``. The code released with it leaves ½ log 2π out,
which prunes wherever the change of the log evidence is above −½ log 2π. A gate that the network
does not need drifts towards its prior, where the change tends to zero *from below*, so that the
exact rule hardly ever fires, and all published results are those of the shifted one. In words of
probability, ``tau`` is the prior log odds that a unit is redundant, 5 to 2 by default.
"""


class Criterion(ABC):
    """Decides which gates can be closed.

    Attributes:
        additive: Whether the margins of several gates, their ``tau`` included, add up to that of
            closing all of them, as changes of the log evidence do.
    """

    additive: ClassVar[bool] = False

    @abstractmethod
    def margin(self, posterior: TruncatedLogNormal, norms: Callable[[], Tensor]) -> Tensor:
        """Margin of each gate in favour of closing it.

        Args:
            posterior: The gates' posteriors, ``[units]``.
            norms: Returns the L2 norms of the units' weights, ``[units]``.

        Returns:
            Float64 ``[units]``.
        """


@dataclass(frozen=True)
class SignalToNoise(Criterion):
    """Close where E[θ]/√Var[θ] is at most ``threshold`` (Neklyudov et al. 2017).

    Example:
        >>> q = TruncatedLogNormal(torch.tensor([0.0, -8.0]), torch.tensor([-5.0, 1.1]))
        >>> SignalToNoise().margin(q, lambda: torch.ones(2)) >= 0
        tensor([False,  True])
    """

    threshold: float = 1.0

    def margin(self, posterior: TruncatedLogNormal, norms: Callable[[], Tensor]) -> Tensor:
        """``threshold`` less the signal-to-noise ratio."""
        return self.threshold - posterior.snr()


@dataclass(frozen=True)
class WeightNorm(Criterion):
    """Close where the L2 norm of the unit's weights is at most ``threshold``; a baseline."""

    threshold: float = 0.5

    def margin(self, posterior: TruncatedLogNormal, norms: Callable[[], Tensor]) -> Tensor:
        """``threshold`` less the norm."""
        return self.threshold - norms()


@dataclass(frozen=True)
class PosteriorMean(Criterion):
    """Close where E[θ] is at most ``threshold``; a baseline of arXiv:2406.01345."""

    threshold: float = 0.1

    def margin(self, posterior: TruncatedLogNormal, norms: Callable[[], Tensor]) -> Tensor:
        """``threshold`` less the posterior mean."""
        return self.threshold - posterior.mean()


@dataclass(frozen=True)
class BMRSNormal(Criterion):
    """BMRS_N: close where a spike at zero has higher evidence (arXiv:2406.01345, eq. 8).

    Args:
        tau: Tolerated evidence against closing; 0 is exact, :data:`DEFAULT_TAU` that of the
            released code.
        mu_p: Location of the spike in log θ; ``None`` for the lower bound.
        sigma_p: Scale of the spike; 0 gives the Savage-Dickey ratio, the paper has 1e-6.
    """

    tau: float = DEFAULT_TAU
    mu_p: float | None = None
    sigma_p: float = 0.0
    additive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sigma_p < 0:
            raise ArgumentError(f"Expected `sigma_p` of at least 0, got {self.sigma_p}.")

    def margin(self, posterior: TruncatedLogNormal, norms: Callable[[], Tensor]) -> Tensor:
        """ΔF + tau."""
        return delta_f_normal(posterior, mu_p=self.mu_p, sigma_p=self.sigma_p) + self.tau


@dataclass(frozen=True)
class BMRSUniform(Criterion):
    """BMRS_U: close where a prior on gates below ``2^-p1`` has higher evidence (arXiv:2406.01345).

    Args:
        p1: Bits of precision at which a gate counts as closed; fewer prune more.
        p2: Bits below which it does not; the paper has 23, which keeps the gates that have
            collapsed furthest, ``None`` leaves no such hole.
        tau: As in :class:`BMRSNormal`; the paper's rule is ``BMRSUniform(p1, p2=23, tau=0)``.
    """

    p1: float = 8.0
    p2: float | None = None
    tau: float = DEFAULT_TAU
    additive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.p1 < (float("inf") if self.p2 is None else self.p2):
            raise ArgumentError(f"Expected 0 < `p1` < `p2`, got {self.p1} and {self.p2}.")

    def margin(self, posterior: TruncatedLogNormal, norms: Callable[[], Tensor]) -> Tensor:
        """ΔF + tau."""
        return delta_f_uniform(posterior, p1=self.p1, p2=self.p2) + self.tau


_NAMED: dict[str, Criterion] = {
    "snr": SignalToNoise(),
    "l2": WeightNorm(),
    "mean": PosteriorMean(),
    "bmrs-n": BMRSNormal(),
}


def find_criterion(criterion: Criterion | str) -> Criterion:
    """Look a criterion up by name: snr, l2, mean, bmrs-n, or bmrs-u and its p1, as in bmrs-u8.

    Raises:
        ArgumentError: If there is none of that name.

    Example:
        >>> find_criterion("bmrs-u4").p1
        4.0
    """
    if isinstance(criterion, Criterion):
        return criterion
    uniform = re.fullmatch(r"bmrs-u(\d+(?:\.\d+)?)", criterion)
    if uniform:
        return BMRSUniform(p1=float(uniform[1]))
    if criterion not in _NAMED:
        raise ArgumentError(
            f"Expected one of {', '.join(_NAMED)}, bmrs-u8 (any p1), got {criterion!r}."
        )
    return _NAMED[criterion]


def choose_closed(
    margins: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    amount: float | int | None = None,
    beyond: bool = False,
    keep: int = 1,
) -> dict[str, Tensor]:
    """Choose open gates to close.

    Args:
        margins: Margins by site, ``[units]`` each.
        masks: Boolean by site, ``True`` where the gate is open.
        amount: At most this fraction or number of the open gates of all sites, those of
            the largest margins; ``None`` closes every gate with a margin of zero or more.
        beyond: Close ``amount`` even where the margins are negative, which turns the criterion
            into a ranking.
        keep: Gates that stay open at each site, those of the smallest margins.

    Returns:
        Boolean by site, ``True`` where a gate closes; ties are broken by index.

    Raises:
        ArgumentError: If ``amount`` is impossible, or ``beyond`` is set without it.
        ArgumentTypeError: If ``amount`` is no number.

    Cost: one sort of all margins.

    Example:
        >>> margins = {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([2.0, 3.0])}
        >>> open_ = {name: torch.ones(2, dtype=torch.bool) for name in margins}
        >>> choose_closed(margins, open_)
        {'a': tensor([ True, False]), 'b': tensor([False,  True])}
        >>> choose_closed(margins, open_, amount=1)
        {'a': tensor([False, False]), 'b': tensor([False,  True])}
    """
    check_count("keep", keep, minimum=0)
    if beyond and amount is None:
        raise ArgumentError("Expected an `amount` with beyond=True, got none.")
    flat = torch.cat([margins[name].detach().cpu().double() for name in masks])
    still_open = torch.cat([mask.cpu() for mask in masks.values()])
    candidates = still_open & ~_protected(margins, masks, keep)
    if not beyond:
        candidates &= flat >= 0
    order = flat.masked_fill(~candidates, -torch.inf).sort(descending=True, stable=True).indices
    count = int(candidates.sum())
    if amount is not None:
        check_amount(amount)
        count = min(count, count_to_prune(amount, int(still_open.sum())))
    closed = torch.zeros_like(still_open)
    closed[order[:count]] = True
    parts = closed.split([mask.numel() for mask in masks.values()])
    return {
        name: part.to(mask.device) for (name, mask), part in zip(masks.items(), parts, strict=True)
    }


def _protected(margins: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: int) -> Tensor:
    protected = []
    for name, mask in masks.items():
        still_open = mask.cpu()
        ranked = margins[name].detach().cpu().masked_fill(~still_open, torch.inf)
        stays = torch.zeros_like(still_open)
        stays[ranked.sort(stable=True).indices[:keep]] = True
        protected.append(stays & still_open)
    return torch.cat(protected)
