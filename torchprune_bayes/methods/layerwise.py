"""Any scores, with every layer's remaining weights re-fit: the method for transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice, check_count, check_positive
from torchprune_bayes._numerics.layer_update import damped, descend_rows, solve_rows, sweep
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature.layer_inputs import LayerInputs
from torchprune_bayes.curvature.layers.inputs import InputMoment, matrix_of, weight_of
from torchprune_bayes.errors import ArgumentError, CalibrationWarning
from torchprune_bayes.methods._layer_scores import TOKEN_FISHER, Registered, Scorer, TokenFisher
from torchprune_bayes.methods._pattern import GroupTarget, Pattern
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.registry import register
from torchprune_bayes.methods.stepwise import ranked_groups
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import sparsity_path
from torchprune_bayes.types import Decision, Masks

PATHS = ("cubic", "geometric", "linear")
SOLVERS = ("iterative", "exact", "sequential")
_DESCENT = 10  # 5 and 20 give the same perplexities, within one percent


@register("layerwise", title="global scores, layers solved anew in rounds", paper="")
class Layerwise(PruningMethod):
    """Choose masks by a method that only scores, and re-fit every layer, in rounds.

    A global ranking knows which layers can spare most, and exact least squares on a layer's inputs
    compensate; each round does both, at the weights of the round before. After
    the masks are chosen, the rows of every layer are solved for the weights that change its outputs
    on the calibration tokens the least, as in `SparseGPT <https://arxiv.org/abs/2301.00774>`_ but
    for any mask and without an order of the columns; layer by layer, so that later ones see the
    inputs that they will have.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune; ``None`` with a
            pattern, which fixes it.
        calibration: Data, model and loss. Layers are solved on all tokens of all its samples.
        scores: Scores that choose the masks. ``"token-fisher"``: ``½ w² (F_ii + λ)`` with the
            squared gradients of single tokens, ``F_ii = (1/N) Σ_n Σ_t g_nt² a_nt²``, found once at
            the dense weights. Or a registered method, such as ``"opd"``, ``"kfac"``,
            ``"diagonal-fisher"``, ``"magnitude"`` or ``"snip"``, which scores afresh in each round;
            one that also moves weights is asked not to.
        score_options: Options of that method; of ``"token-fisher"`` they are ``kind``
            (``"empirical"`` or ``"monte_carlo"``), ``labels``, how many are enough (2048), and
            ``damping``, ``λ`` in units of the mean of ``F_ii`` (1).
        steps: Rounds.
        path: Sparsity over the rounds, ``"cubic"``, ``"geometric"`` or ``"linear"``; a pattern
            has few sparsities on the way to its own, which follow evenly.
        solver: ``"iterative"`` takes ten steps of conjugate gradients for all rows of a layer
            together, which is nearly exact; ``"exact"`` factorises the moment of each row's own
            mask; ``"sequential"`` goes through the columns once for all rows.
        damping: Relative to the mean square of a layer's inputs.
        ignore_padding: Whether tokens that the ``attention_mask``, or of a decoder beside an
            encoder the ``decoder_attention_mask``, leaves out do not count.
        pattern: ``"N:M"``, whose rounds go down to ``N`` kept of every ``M``, by one where there
            are as many ``steps``: 7, 6, 5 and 4 for 4:8; or ``"1xM"``, which prunes ``amount`` of
            the groups of ``M`` inputs.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.

    Raises:
        ArgumentError: If an option has an impossible value, or the scores move weights.
        ArgumentTypeError: If there is no calibration.
        CalibrationError: If the data gave no usable scores or inputs.

    Warns:
        CalibrationWarning: If layers were only masked, because the samples do not reach them or
            because they are neither linear layers nor convolutions.

    Cost: a backward pass for as many samples as have 2048 labels; then per round one forward pass
    with the activations of all samples (more passes where the calibration's memory budget does not
    hold them), ``n²`` multiplications per token of a layer with ``n`` inputs, and ``10 n²`` per row
    (``"exact"``: ``k³/3`` for a row that keeps ``k`` inputs).

    Example:
        >>> from torchprune_bayes import prune_global
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))
        >>> data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(4)]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> decision = prune_global(None, "layerwise", amount=0.5, calibration=calibration)
        >>> [step["kept"] for step in decision.info["steps"]]
        [125, 99, 89, 88]
    """

    always_moves = True

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None,
        *,
        calibration: Calibration | None = None,
        scores: str = TOKEN_FISHER,
        score_options: Mapping[str, Any] | None = None,
        steps: int = 4,
        path: Literal["cubic", "geometric", "linear"] = "cubic",
        solver: Literal["iterative", "exact", "sequential"] = "iterative",
        damping: float = 0.01,
        ignore_padding: bool = True,
        pattern: str | None = None,
        scope: Literal["global", "layer"] = "global",
    ) -> None:
        self.pattern = None if pattern is None else Pattern.parse(pattern)
        if self.pattern is not None:
            amount = self.pattern.amount(amount)
        super().__init__(amount, calibration=calibration, scope=scope)  # type: ignore[arg-type]
        check_count("steps", steps)
        check_choice("path", path, PATHS)
        check_choice("solver", solver, SOLVERS)
        check_positive("damping", damping)
        self.steps, self.path, self.solver, self.damping = steps, path, solver, damping
        self.ignore_padding = ignore_padding
        self.scores = scores
        self.score_options = dict(score_options or {})
        self._scorer(None)

    def decide(self, space: ParameterSpace) -> Decision:
        """Choose masks and new weights, round by round; the model is not changed.

        Args:
            space: The calibration's parameters.

        Raises:
            ArgumentError: If the scoring method moves weights, or chose nothing new.
            CalibrationError: If the data gave no usable scores or inputs.
        """
        weights, masks, reports = space.values(), space.masks(), []
        scores, rounds = None, self._rounds(space, masks)
        unsolved: list[str] = []
        scorer: Scorer | None = self._scorer(self.required_calibration)
        for index, (amount, pattern) in enumerate(rounds):
            assert scorer is not None
            seen = space.with_masks(masks).with_values(weights)
            decision = scorer.decide(seen, amount, pattern)
            masks = decision.masks
            reports.append({"kept": _count(masks), "scores": decision.info})
            if index == len(rounds) - 1:  # either what scores or the scores: both are large
                scores, scorer = decision.scores, None
            del decision, seen
            weights, unsolved = self._solved(space, weights, masks)
        _warn_of(unsolved)
        info = {"steps": reports, "scores": self.scores, "damping": self.damping}
        return Decision(masks, weights if rounds else None, scores, info)

    def _rounds(self, space: ParameterSpace, masks: Masks) -> list[tuple[Any, Pattern | None]]:
        """Amount that each round prunes of the remaining entries."""
        pattern, amount, size = self.pattern, self.amount, 1
        if pattern is not None:
            target = pattern.target(
                masks, pattern.dims(space), amount, steps=1, scope=self.scope
            )  # checks, too
            if not isinstance(target, GroupTarget):
                return [(None, kept) for kept in pattern.on_the_way(self.steps)]
            groups_of = target.groups()
            masks, amount, size = groups_of.initial, groups_of.amount, pattern.size
        groups = ranked_groups(masks, amount, self.scope, self._sparsities)
        amounts: list[tuple[Any, Pattern | None]] = []
        for step in range(len(groups[0].goals)):
            counts = [size * (g.goals[step] - (g.goals[step - 1] if step else 0)) for g in groups]
            if any(counts):
                named = {g.names[0]: count for g, count in zip(groups, counts, strict=True)}
                amounts.append((named if self.scope == "layer" else counts[0], pattern))
        return amounts

    def _sparsities(self, final: float, initial: float) -> list[float]:
        if final == 1.0:  # nothing is left that could be scored
            return [final]
        return sparsity_path(self.path, final, self.steps, initial)

    def _scorer(self, calibration: Calibration | None) -> Scorer:
        if self.scores == TOKEN_FISHER:
            try:
                return TokenFisher(calibration, self.scope, **self.score_options)
            except TypeError as error:
                raise ArgumentError(
                    f"Expected `kind`, `labels` and `damping` in `score_options` of "
                    f"{TOKEN_FISHER!r}, got {', '.join(self.score_options)}."
                ) from error
        scorer = Registered(self.scores, calibration, self.scope, self.score_options)
        by_itself = self.pattern is not None and not self.pattern.takes_whole_groups
        scorer.method(None if by_itself else 0.0, self.pattern)  # checks its options
        return scorer

    def _solved(
        self, space: ParameterSpace, weights: Mapping[str, Tensor], masks: Masks
    ) -> tuple[dict[str, Tensor], list[str]]:
        """New weights, and the names of those that are only masked."""
        calibration = self.required_calibration.with_space(space)
        inputs = LayerInputs(calibration, ignore_padding=self.ignore_padding)
        unsolved = [name for name in weights if name not in inputs.names]

        def update(name: str, moment: InputMoment) -> Tensor | None:
            if not moment.tokens:
                unsolved.append(name)
                return None
            return self._new_weight(moment, weights[name], masks[name])

        updated = inputs.update(update, weights, masks)
        new = {
            name: updated[name].to(value) if name in updated else value * masks[name]
            for name, value in weights.items()
        }
        return new, unsolved

    def _new_weight(self, moment: InputMoment, weight: Tensor, mask: Tensor) -> Tensor:
        module, place = moment.module, moment.total.device
        wanted, keep = (matrix_of(module, t.to(place)) for t in (weight, mask))
        solved = []
        for gram, rows, kept in zip(moment.mean, wanted, keep, strict=True):
            matrix = damped(gram, self.damping)
            if self.solver == "iterative":
                solved.append(descend_rows(matrix, rows, kept, _DESCENT))
            elif self.solver == "exact":
                solved.append(solve_rows(matrix, rows, kept))
            else:
                solved.append(sweep(matrix, rows, partial(_given, kept))[0])
        return weight_of(module, torch.stack(solved), weight)


def _given(kept: Tensor, columns: slice, values: Tensor, costs: Tensor) -> Tensor:
    return kept[:, columns]


def _count(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _warn_of(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"The remaining weights of {', '.join(names)} stay as they are, because no calibration "
            "sample reaches them or they are of no linear layer or convolution: give more samples, "
            "or leave them out.",
            CalibrationWarning,
            stacklevel=2,
        )
