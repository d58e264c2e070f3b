"""CBS: combinatorial selection of what to prune, and the exact joint update of the rest.

The published pipeline in three places: :meth:`CBS.score` is the start, :meth:`CBS.select` CBS-S,
and CBS-U the joint update that all methods here share (:mod:`torchprune_bayes._numerics.obs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice, check_count, check_fraction
from torchprune_bayes._numerics.swaps import swap_search
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods._obs_step import Stage
from torchprune_bayes.methods._swap_selection import OBJECTIVES, SwapSelection
from torchprune_bayes.methods.registry import register
from torchprune_bayes.methods.woodfisher import WoodFisher
from torchprune_bayes.seeds import derived_seed
from torchprune_bayes.types import Masks, Scores

INITIALS = ("perturbed", "magnitude", "woodfisher", "gradient", "random")
GRADIENT_STEPS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)


@register(
    "cbs",
    title="combinatorial brain surgeon: swaps what to prune, then updates the rest jointly",
    paper="arXiv:2203.04466",
)
class CBS(WoodFisher):
    """Choose the weights to prune jointly, because the effects of some cancel each other.

    `Combinatorial Brain Surgeon (Yu et al., 2022) <https://arxiv.org/abs/2203.04466>`_. CBS-S
    starts from a mask and swaps pruned against kept weights while the quadratic model of the loss
    falls; of the masks on the way, the one with the smallest loss on held-out samples is used,
    never one that is worse than the start. CBS-U then moves the kept weights by the exact solution
    for all pruned ones, ``(F⁻¹)_PP λ = w_P``, ``δ = −F⁻¹_{:,P} λ``.

    The search scores all pairs of ``swap_range`` weights of either side with one matrix product
    instead of pair by pair, and its number of pruned weights is exact, so is that of the start.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune; ``None`` with
            ``flops_target``, and with an N:M pattern.
        initial: Start of the search: ``"magnitude"``; ``"perturbed"``, the best by held-out loss of
            ``perturbations`` random magnitude perturbations; ``"woodfisher"``; ``"gradient"``,
            ``|w·ḡ|``; ``"random"``; or masks by name, which prune as many entries as are to go
            (with ``max_iterations=0`` they are kept, and only CBS-U is left).
        perturbations: Starts to draw, that of plain magnitude included.
        objective: What a swap must lower: ``"selection"``, the loss before the update, or
            ``"post_update"``, after it.
        epsilon: Smallest gain of a swap, as a share of the objective.
        swap_range: The paper's ``ρ``: weights of either side that are paired. Here all with all.
        max_no_match: The paper's ``τ``: lots of pairs without a swap after which the search ends.
        max_iterations: Iterations at most; each swaps up to ``swap_range`` pairs.
        gradient_step: Share ``η`` of the first-order term in the update, or ``"auto"``, a line
            search on held-out loss; with several steps this descends while it prunes.
        stages: Parts of a step, as of :class:`~torchprune_bayes.WoodFisher`, each with a search of
            its own.
        options: As of :class:`~torchprune_bayes.WoodFisher`: ``calibration``, ``curvature``,
            ``block_size``, ``damping``, ``update``, ``update_scale``, ``steps``, ``path``,
            ``scope``, ``pattern``, and so on. In an N:M pattern entries are swapped within their
            group, in a pattern of whole groups these are. Swaps are within a block, so that the
            blocks' shares are those of the start.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is neither calibration nor curvature.

    Cost per step: ``N`` gradients; per iteration ``2ND + 8NT²`` operations and a forward pass over
    held-out samples; ``4ND`` bytes for the gradients and ``O(D + T²)`` beside them.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> from torchprune_bayes import Calibration, prunable_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))
        >>> data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(4)]
        >>> params = prunable_parameters(model)
        >>> calibration = Calibration(
        ...     model, data, torch.nn.functional.cross_entropy, params=params, num_samples=64
        ... )
        >>> prune.global_unstructured(
        ...     params, pruning_method=CBS, amount=0.5, calibration=calibration
        ... )
        >>> sum(int((module.weight == 0).sum()) for module, _ in params)
        88
    """

    always_moves = True

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None = None,
        *,
        initial: str | Masks = "perturbed",
        perturbations: int = 50,
        objective: str = "selection",
        epsilon: float = 1e-4,
        swap_range: int = 128,
        max_no_match: int = 3,
        max_iterations: int = 100,
        gradient_step: float | Literal["auto"] = 0.0,
        stages: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(amount, stages=stages, **options)
        if isinstance(initial, str):
            check_choice("initial", initial, INITIALS)
        elif (self.steps, self.stages) != (1, 1):
            raise ArgumentError("Expected one step and one stage with masks as `initial`.")
        check_choice("objective", objective, OBJECTIVES)
        check_count("perturbations", perturbations)
        check_fraction("epsilon", epsilon)
        check_count("swap_range", swap_range)
        check_count("max_no_match", max_no_match)
        check_count("max_iterations", max_iterations, minimum=0)
        if gradient_step != "auto":
            check_fraction("gradient_step", gradient_step)
        if self.pattern is not None and self.pattern.takes_whole_groups:
            check_choice("objective with a pattern of whole groups", objective, ("selection",))
        self.initial, self.perturbations, self.objective = initial, perturbations, objective
        steps = GRADIENT_STEPS if isinstance(gradient_step, str) else (float(gradient_step),)
        self.tuning = replace(self.tuning, gradient_steps=steps)
        self.procedure = replace(self.procedure, select=self.select, descends=steps != (0.0,))
        self._search = partial(
            swap_search,
            epsilon=epsilon,
            swap_range=swap_range,
            max_no_match=max_no_match,
            max_iterations=max_iterations,
        )

    def score(self, stage: Stage) -> Tensor:
        """Scores whose smallest entries are the start of the search, ``[D]``."""
        if self.initial == "woodfisher":
            return super().score(stage)
        scores = stage.weights.abs()
        if not isinstance(self.initial, str):
            # Pruned entries first; the scores within either side do not matter.
            return stage.fisher.remaining.gather(self.initial).to(scores)
        if self.initial == "gradient":
            scores = scores * stage.fisher.mean_gradient().abs().to(scores)
        if self.initial == "random":
            scores = torch.rand(scores.shape, generator=self._generator(stage)).to(scores)
        return scores if self.pattern is None else self.pattern.ranks(scores, stage.remaining)

    def select(self, stage: Stage, scores: Scores) -> Masks:
        """CBS-S: the best masks that a search from the smallest scores finds."""
        start = stage.smallest(scores)
        if not isinstance(self.initial, str):
            _check_start(start, self.initial)
        selection = SwapSelection(
            stage,
            self.objective,
            self._search,
            pattern=self.pattern,
            update=self.procedure.update,
            shared=self.scope == "global" and self.flops_target is None,
        )
        generator = self._generator(stage) if self.initial == "perturbed" else None
        return selection.best(start, self.perturbations, generator)

    def _generator(self, stage: Stage) -> torch.Generator:
        seed = 0 if self.calibration is None else self.calibration.seed
        return torch.Generator().manual_seed(derived_seed(seed, "perturbations", stage.step.index))


def _check_start(start: Masks, initial: Masks) -> None:
    if any(not torch.equal(mask, initial[name].to(mask.device)) for name, mask in start.items()):
        raise ArgumentError(
            "Expected masks as `initial` that prune as many entries as `amount` says, got "
            f"{sum(int((~mask).sum()) for mask in initial.values())} pruned."
        )


@register(
    "cbs-post-update",
    title="CBS whose swaps lower the loss after the joint update",
    paper="arXiv:2203.04466",
)
class PostUpdateCBS(CBS):
    """:class:`CBS` with the true combinatorial objective, ``½ w_Pᵀ(F⁻¹_PP)⁻¹w_P``.

    The paper splits the problem into a selection that moves nothing and an update. Here a swap is
    scored by what is lost after the optimal update of all kept weights; 2x2 Schur complements keep
    these scores exact from swap to swap. Masks are judged after the update as well.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        objective: As of :class:`CBS`.
        epsilon: Smallest gain of a swap. The damping of the pruned weights is a large, almost
            constant part of this objective, hence a smaller share.
        options: As of :class:`CBS`.

    Cost per iteration: ``3N²D + N³/3`` operations beside those of :class:`CBS`.

    Example:
        >>> from torchprune_bayes import Calibration, prune_global
        >>> model = torch.nn.Linear(8, 3)
        >>> data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(4)]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> decision = prune_global(None, PostUpdateCBS, amount=0.5, calibration=calibration)
        >>> int(decision.masks["weight"].sum())
        12
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None = None,
        *,
        objective: str = "post_update",
        epsilon: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(amount, objective=objective, epsilon=epsilon, **options)
