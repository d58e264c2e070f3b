"""Scores that choose the masks in the rounds of ``layerwise``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

from torch import Tensor

from torchprune_bayes._checks import check_choice, check_count, check_positive
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import LayerCurvature
from torchprune_bayes.errors import ArgumentError, CalibrationError
from torchprune_bayes.methods._pattern import Pattern, kept_by
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.registry import find_method
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision, Masks, Scores

TOKEN_FISHER = "token-fisher"
_BATCH = 8  # activations for a backward pass are most of the memory
_OWN = ("amount", "calibration", "curvature", "model", "pattern", "posterior", "scope")


class Scorer(Protocol):
    """Ranks what a round has left."""

    def decide(self, space: ParameterSpace, amount: Any, pattern: Pattern | None) -> Decision:
        """Masks of the next round, at the weights and masks of ``space``."""
        ...


class TokenFisher:
    """``½ w² (F_ii + λ)`` with ``F_ii = (1/N) Σ_n Σ_t g_nt² a_nt²`` of the dense weights.

    Tokens count as samples. The squares are computed once, in one pass, and only the weights
    change between rounds: what layers are worth to the loss changes little while their outputs
    stay what they were. A tensor without any, such as an expert that no token reaches, is ranked by
    magnitude.

    Args:
        calibration: Data, model and loss.
        scope: ``"global"`` or ``"layer"``.
        kind: Whose labels: ``"empirical"``, the data's, or ``"monte_carlo"``, the model's.
        labels: Labels that are enough, which are far fewer sequences than classified texts.
        damping: ``λ``, relative to the mean of ``F_ii`` over all tensors.

    Raises:
        ArgumentError: If an option has an impossible value.
    """

    def __init__(
        self,
        calibration: Calibration | None,
        scope: str,
        *,
        kind: Literal["empirical", "monte_carlo"] = "empirical",
        labels: int = 2048,
        damping: float = 1.0,
    ) -> None:
        check_choice("kind", kind, ("empirical", "monte_carlo"))
        check_count("labels", labels)
        check_positive("damping", damping)
        self.calibration, self.scope, self.damping = calibration, scope, damping
        self.kind: Literal["empirical", "monte_carlo"] = kind
        self.labels = labels
        self._diagonal: dict[str, Tensor] = {}
        self._samples = 0

    def decide(self, space: ParameterSpace, amount: Any, pattern: Pattern | None) -> Decision:
        """Rank the remaining entries.

        Raises:
            CalibrationError: If the loss does not depend on the weights.
        """
        assert self.calibration is not None
        weights, masks = space.values(), space.masks()
        if not self._diagonal:
            self._fit(self.calibration, weights, masks)
        scores = {
            name: weight.to(diagonal).square().mul_(diagonal).div_(2).to(weight.device)
            for name, weight in weights.items()
            for diagonal in [self._diagonal[name]]
        }
        amount = amount if pattern is None else pattern.amount(amount)
        kept = kept_by(space, scores, amount, pattern=pattern, scope=self.scope)
        return Decision(kept, scores=scores, info={"samples": self._samples})

    def _fit(self, calibration: Calibration, weights: Mapping[str, Tensor], masks: Masks) -> None:
        curvature = LayerCurvature(
            self.kind, positions="independent", most_terms=self.labels, batch_size=_BATCH
        )
        curvature.fit(calibration, weights, masks)
        self._diagonal = _damped(curvature.diagonal(), self.damping)
        self._samples = curvature.count


def _damped(diagonal: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """``F_ii`` plus ``damping`` times the mean of all, in place.

    Raises:
        CalibrationError: If all are zero.
    """
    total = sum(float(value.sum()) for value in diagonal.values())
    if not total:
        raise CalibrationError(
            "Expected a loss that depends on the weights, got gradients of zero for all samples: "
            "check the loss and its labels."
        )
    shift = damping * total / sum(value.numel() for value in diagonal.values())
    for value in diagonal.values():
        value.add_(shift)
    return diagonal


class Registered:
    """A registered method, with new scores in each round.

    One that knows no patterns decides on as many entries as the pattern prunes, and its scores are
    ranked in the pattern.

    Args:
        name: Of a method of this package; one that also moves weights is asked not to.
        calibration: Data, model and loss.
        scope: ``"global"`` or ``"layer"``.
        options: Of the method.

    Raises:
        ArgumentError: If it is none that scores, or an option is not one of the scores alone.
    """

    def __init__(
        self, name: str, calibration: Calibration | None, scope: str, options: Mapping[str, Any]
    ) -> None:
        self.name, self.calibration, self.scope = name, calibration, scope
        self._options: dict[str, Any] = {"scope": scope, **options}
        kind = find_method(name).method
        if not issubclass(kind, PruningMethod):
            raise ArgumentError(
                f"Expected a method of this package that scores for `scores`, got {name!r}."
            )
        if kind.always_moves:
            raise ArgumentError(
                f"Expected a method that only scores for `scores`, got {name!r}, which moves "
                "weights."
            )
        wrong = [key for key in options if key in _OWN]
        if wrong:
            raise ArgumentError(
                f"Expected options of the scores alone in `score_options`, got {wrong[0]!r}: it is "
                "an argument of its own, or is found anew in each round."
            )
        self._kind, known = kind, _arguments_of(kind)
        self._knows_patterns = "pattern" in known
        if "update" in known:
            self._options["update"] = "none"

    def method(self, amount: Any, pattern: Pattern | None) -> PruningMethod:
        """The method of one round.

        Raises:
            ArgumentError: If an option is impossible.
        """
        options = dict(self._options)
        if pattern is not None and self._knows_patterns:
            options["pattern"] = str(pattern)
        elif pattern is not None:
            amount = pattern.amount(amount)
        return self._kind(amount, **options)

    def decide(self, space: ParameterSpace, amount: Any, pattern: Pattern | None) -> Decision:
        """Decision of the method."""
        method = self.method(amount, pattern)
        assert self.calibration is not None
        method.calibration = self.calibration.with_space(space)
        decision = method.decide(space)
        if pattern is None or self._knows_patterns:
            return decision
        scores = _not_negative(decision.scores or {})
        amount = pattern.amount(amount)
        kept = kept_by(space, scores, amount, pattern=pattern, scope=self.scope)
        return replace(decision, masks=kept)


def _arguments_of(kind: type) -> set[str]:
    """Names of the arguments of a class and of those that it hands ``**options`` on to."""
    known: set[str] = set()
    for part in kind.__mro__:
        known |= set(inspect.signature(part.__init__).parameters)  # type: ignore[misc]
        if "options" not in inspect.signature(part.__init__).parameters:  # type: ignore[misc]
            break
    return known


def _not_negative(scores: Scores) -> Scores:
    """The scores less the smallest of all, if that is negative, as those that can be gains are."""
    least = min(float(score.min()) for score in scores.values())
    return {name: score - least for name, score in scores.items()} if least < 0 else scores
