"""Choice of damping, blocks and step length for one pruning step.

In plain words: the spectrum of the Gram matrix, which is there anyway, tells for every damping how
well the update would do on a gradient that it did not see. That says where to look. A few forward
passes over held-out samples then decide: between one block and small ones, between neighbouring
dampings, and how much of the moves to take. From one step to the next the damping is only moved a
little, because the weights that are left late need far more of it than the network as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from warnings import warn

import torch

from torchprune_bayes._numerics.selection import smallest_k
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import CalibrationWarning
from torchprune_bayes.methods._moves import (
    Move,
    best_by_coordinates,
    falling,
    loss_of,
    walk_from,
)
from torchprune_bayes.methods._obs_step import (
    Procedure,
    Pruned,
    Stage,
    State,
    Step,
    StepReport,
    prune_step,
)

RELATIVE_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
"""What ``"auto"`` chooses from, in units of the mean squared gradient."""
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the update that ``"auto"`` chooses from."""
_WALK_FACTOR = 3.0
_ABOUT_EQUAL = 1.05
_SMALL_BLOCKS = (128, 256)


@dataclass(frozen=True)
class Tuning:
    """Settings chosen for each step, and their candidates.

    Attributes:
        damping: ``λ``, or ``"auto"``.
        scales: Shares of the update to choose from, in rising order.
        gradient_steps: ``η`` to choose from, in rising order; ``(0.0,)`` for none.
    """

    damping: float | str
    scales: tuple[float, ...]
    gradient_steps: tuple[float, ...] = (0.0,)

    def best(self, step: Step, procedure: Procedure) -> Move:
        """The move of smallest held-out loss.

        Args:
            step: The start.
            procedure: The method's procedure.

        Raises:
            CalibrationError: If no held-out loss is finite.

        Cost: the spectra of a few Gram matrices. Up to two million entries, one stage and a few
        held-out losses for two to three dampings of one block, and the step itself for either kind
        of blocks; beyond, the step alone. Then two to eight held-out losses for the lengths of the
        moves.
        """
        if not isinstance(self.damping, str):
            return self._with_blocks(step, procedure, [float(self.damping)])
        if step.held_out is None:
            return self._with_blocks(step, procedure, [step.fisher.damping])
        if step.last is not None and step.last.mean_square:
            return self._from_last(step, step.last, procedure)
        unit = step.damping_unit
        return self._with_blocks(step, procedure, [unit * factor for factor in RELATIVE_DAMPINGS])

    def _with_blocks(self, step: Step, procedure: Procedure, dampings: list[float]) -> Move:
        cuts = block_choices(step)
        if step.is_large:
            damping = dampings[_least_left_out_error(cuts[0], dampings, procedure)]
            return self._best_lengths(prune_step(cuts[0], damping, procedure))
        if len(cuts) == len(dampings) == 1:
            return self._best_lengths(prune_step(cuts[0], dampings[0], procedure))
        moves = [self._best_lengths(self._at_best(cut, dampings, procedure)) for cut in cuts]
        return moves[0] if len(moves) == 1 else min(moves, key=loss_of)

    def _at_best(self, step: Step, dampings: list[float], procedure: Procedure) -> Pruned:
        """The step with the best of several dampings.

        The update that does best on gradients that were left out of it says which, and with one
        block where to begin: from there dampings are tried, in one stage, as long as the held-out
        loss falls. With small blocks the two agree, and trials cost more.
        """
        quick = procedure.screening(step.stages)
        start = _least_left_out_error(step, dampings, quick)
        if len(dampings) == 1 or len(step.fisher.blocks) > 1:
            return prune_step(step, dampings[start], procedure)
        moves: dict[int, Move] = {}

        def loss_at(index: int) -> float:
            if index not in moves:
                moves[index] = self._at_full_length(prune_step(step, dampings[index], quick))
            return loss_of(moves[index])

        best = moves[falling(loss_at, start, len(dampings))].pruned
        return best if quick is procedure else best.again(procedure)

    def _at_full_length(self, pruned: Pruned) -> Move:
        return self._by_coordinates(pruned, (self.scales[-1], self.gradient_steps[0]))

    def _from_last(self, step: Step, last: StepReport, procedure: Procedure) -> Move:
        """The best damping near the last one, in units of the mean squared gradient.

        Up and down in turn, and on as long as the loss falls.
        """
        assert last.mean_square is not None
        unit = step.damping_unit
        step = step.with_blocks(last.block_size)
        walk = walk_from(
            last.damping / last.mean_square * unit,
            _WALK_FACTOR if step.index % 2 else 1.0 / _WALK_FACTOR,
            (unit * RELATIVE_DAMPINGS[0], unit * RELATIVE_DAMPINGS[-1]),
        )
        best = self._best_lengths(prune_step(step, walk[0], procedure)).measured()
        for damping in walk[1:]:
            same = Move(prune_step(step, damping, procedure), best.scale, best.gradient_step)
            if loss_of(same := same.measured()) >= loss_of(best):
                break
            lengths = self._candidate(best)
            if lengths is None:
                best = self._best_lengths(same.pruned).measured()
            else:
                best = self._by_coordinates(same.pruned, lengths)
        return best

    def _best_lengths(self, pruned: Pruned) -> Move:
        """The best move, from that of the last step or from the smallest if this is better."""
        smallest, whole = ((self.scales[at], self.gradient_steps[0]) for at in (0, -1))
        start = self._candidate(pruned.step.last) or whole
        if smallest != start:
            start = min((start, smallest), key=lambda at: loss_of(Move(pruned, *at)))
        best = self._by_coordinates(pruned, start)
        if best.loss is None or not self.scales[0]:
            return best
        return min(best, Move(pruned, 0.0, 0.0).measured(), key=loss_of)  # no move at all

    def _candidate(self, last: Move | StepReport | None) -> tuple[float, float] | None:
        """The lengths of a move, to search from; ``None`` for one that only pruned.

        Without any update is a way out that need not be among the candidates.
        """
        if last is None or last.scale not in self.scales:
            return None
        return last.scale, last.gradient_step

    def _by_coordinates(self, pruned: Pruned, start: tuple[float, float]) -> Move:
        axes = self.scales, self.gradient_steps
        return best_by_coordinates(lambda scale, eta: Move(pruned, scale, eta), axes, start)


def warn_of_a_rise(start: State, end: State, held_out: Calibration | None) -> None:
    """Warn if a run ends with a held-out loss that no fine-tuning of a few steps would repair."""
    if held_out is None or end.last is None or end.last.loss is None:
        return
    before, after = held_out.held_out_loss(start.weights).value, end.last.loss
    if not after <= 3.0 * abs(before) + 3.0:
        warn(
            f"Pruning raised the held-out loss from {before:.3g} to {after:.3g}: prune less, take "
            "more steps (`steps=`) or more gradients, or train the model further.",
            CalibrationWarning,
            stacklevel=3,
        )


def _least_left_out_error(step: Step, dampings: list[float], procedure: Procedure) -> int:
    """Which damping's update does best on gradients that were left out of it.

    On a few blocks, pruned to the sparsity that the whole step is pruned to. Of errors that are
    about equal the one of the smallest damping counts: its update is the longest, and of that a
    share may be taken later.
    """
    if len(dampings) == 1:
        return 0
    index = step.stages[-1]
    fisher = step.fisher.few_blocks(dampings[len(dampings) // 2])
    masks = fisher.remaining.masks
    weights = fisher.remaining.gather(step.weights)
    scores = procedure.score(Stage(step, fisher, index, masks, weights))
    count = round(step.target.share(index, step.masks) * fisher.remaining.numel)
    keep = smallest_k([scores], count)[0].to(weights.device)
    errors = fisher.held_out_errors(weights, keep, dampings)
    return int((errors <= _ABOUT_EQUAL * errors.min()).to(torch.uint8).argmax())  # the first one


def block_choices(step: Step) -> list[Step]:
    """The step with the blocks to choose from.

    One block over the whole network uses all interactions, and is best where gradients are many;
    where they are few, as always in a network of millions of weights, smaller blocks do not fit
    their noise.
    """
    fisher = step.fisher
    if fisher.block_size != "auto" or step.held_out is None:
        return [step]
    count, entries = fisher.count, fisher.remaining.numel
    least, most = _SMALL_BLOCKS
    small = max(2 * count, min(max(4 * count, least), most))
    sizes: list[int | str] = ["full", small]
    if small >= entries:
        sizes = ["full"]
    elif step.is_large:
        sizes = [small]
    return [step.with_blocks(size) for size in sizes]
