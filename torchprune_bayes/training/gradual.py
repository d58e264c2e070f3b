"""Pruning along a schedule, in any training loop."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer

from torchprune_bayes._checks import check_choice
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.decisions import check_decision, write_updates
from torchprune_bayes.methods.global_pruning import apply_decision, decide_on, unstructured_method
from torchprune_bayes.methods.module_state import all_or_nothing
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.training._due import (
    FlopsGoal,
    Goal,
    Schedules,
    SparsityGoal,
    due_step,
    entry_count,
    flops_arguments,
    pruned_count,
    schedule_groups,
)
from torchprune_bayes.training._optimizers import (
    bare_optimizer,
    check_in_optimizer,
    end_weight_decay,
    ids_in,
)
from torchprune_bayes.training._pruner_arguments import check_options, space_of
from torchprune_bayes.training._pruner_state import PlannedPruning, PrunerState
from torchprune_bayes.training.keep_sparse import (
    HeldZeros,
    hold_gradients_of,
    keep_sparse,
    set_zero,
)
from torchprune_bayes.training.undo import zeroing_undone
from torchprune_bayes.types import Decision, Masks, ParameterPairs

logger = logging.getLogger("torchprune_bayes")

MODES = ("zeros", "hooks")


class GradualPruner:
    """Prune step by step while a model is trained; call :meth:`step` after ``optimizer.step()``.

    Steps are counted from 1, so step ``n`` comes after ``n`` updates; what a schedule has due at 0
    is done at the first call. At each due step exactly ``round(sparsity * entries)`` are pruned in
    all, and gradients and curvature are computed again at the current weights, from another draw
    of the calibration data. All groups of tensors decide before anything is changed.

    There are two ways to keep what is pruned:

    * ``mode="zeros"``, the default: weights remain plain tensors, zeros are the mask, and the
    pruner holds
      the masks. Names in ``state_dict`` do not change, so that checkpoints, ``from_pretrained``,
      ``copy.deepcopy`` and averaged models work. Without ``optimizer`` the zeros hold from one
      call of :meth:`step` to the next ``optimizer.step()``; with it, throughout. Gradients of
      pruned entries are zero before clipping and the optimizer in any case.
    * ``mode="hooks"``: ``<name>_orig`` and ``<name>_mask``, as ``torch.nn.utils.prune`` does.

    Args:
        params: ``(module, name)`` pairs; or a model, for its
            :func:`~torchprune_bayes.prunable_parameters`; ``None`` takes the calibration's.
        method: A pruning method that takes ``amount``, ours or PyTorch's, or a registered name.
        schedule: One :class:`~torchprune_bayes.schedules.Schedule` for all tensors jointly, or
            one for each tensor, by qualified name or pair. Tensors whose schedules are equal are
            pruned jointly.
        calibration: Data, model and loss, for methods that need them.
        optimizer: Its moments are kept at zero where the weights are, see
            :func:`~torchprune_bayes.keep_sparse`; wrapped by accelerate or not. Frozen weights need
            not be in it.
        mode: ``"zeros"`` or ``"hooks"``.
        decay_after: Whether weight decay continues after the end of the schedule; otherwise it
            is zero from there on, in every parameter group that contains one of the tensors.
        options: Further arguments of the method. With ``flops_target``, the share of the FLOPs to
            keep in the end, the schedule only gives the course: at a sparsity ``s`` of the
            schedule, ``s / final`` of the FLOPs to remove are removed.

    Attributes:
        history: A dict of plain values for each pruning: ``step``, ``sparsity``, ``pruned``
            (entries) and ``info``, a list of what the method reported for each group.

    Raises:
        AlignmentError: If ``params`` are not the calibration's or not in the optimizer.
        ArgumentError: If an argument or option has an impossible value, or tensors have no
            schedule.
        ArgumentTypeError: If an argument is missing or of the wrong type, or the optimizer takes no
            hooks.
        ParameterError: If a tensor cannot be pruned.

    Cost: at a due step that of the method, and until it is done a copy of what it changes; at
    others one elementwise pass over the weights, or with ``optimizer`` that of
    :func:`~torchprune_bayes.keep_sparse`. One byte per weight.

    Example:
        >>> import torch
        >>> from torchprune_bayes.schedules import cubic
        >>> model = nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = GradualPruner(
        ...     model, "magnitude", cubic(0.75, begin=1, end=5, every=2), optimizer=optimizer
        ... )
        >>> for _ in range(6):
        ...     model(torch.randn(4, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> [event["step"] for event in pruner.history], pruner.sparsity, pruner.finished
        ([3, 5], 0.75, True)
        >>> int((model.weight == 0).sum())
        48
    """

    def __init__(
        self,
        params: ParameterPairs | nn.Module | None,
        method: type[BasePruningMethod] | str,
        schedule: Schedules,
        *,
        calibration: Calibration | None = None,
        optimizer: Optimizer | None = None,
        mode: str = "zeros",
        decay_after: bool = True,
        **options: Any,
    ) -> None:
        check_choice("mode", mode, MODES)
        kind = unstructured_method(method)
        check_options(kind, options)
        if not decay_after and optimizer is None:
            raise ArgumentTypeError(
                "Expected `optimizer` with decay_after=False, got none: pass the one whose "
                "weight decay is to end."
            )
        self.mode, self._decay_after = mode, decay_after
        self.history: list[dict[str, Any]] = []
        self._space = space_of(params, calibration)
        self._groups = schedule_groups(schedule, self._space)
        self._method: Callable[..., BasePruningMethod] = kind
        self._options = options
        self._calibration = calibration
        self._optimizer = None if optimizer is None else bare_optimizer(optimizer)
        self._step = 0
        self._masks: Masks = {}
        self._held = HeldZeros()
        self._goal = self._goal_of(options.pop("flops_target", None))
        if self._optimizer is not None:
            trained = [tensor.leaf for tensor in self._space if tensor.leaf.requires_grad]
            check_in_optimizer(self._optimizer, trained)

    @property
    def space(self) -> ParameterSpace:
        """The tensors, in order; masks that only the pruner holds are not visible in it."""
        return self._space

    @property
    def masks(self) -> Masks:
        """Boolean masks by qualified name, as they are now."""
        return self._seen(self._space).masks()

    @property
    def sparsity(self) -> float:
        """Share of the entries that are pruned, over all tensors."""
        masks = self.masks.values()
        return pruned_count(masks) / entry_count(masks)

    @property
    def finished(self) -> bool:
        """Whether the end of the schedule is reached, after which no step prunes."""
        return all(
            self._goal.is_reached(self._seen(group), schedule)
            for schedule, group in self._groups.items()
        )

    @property
    def due(self) -> bool:
        """Whether the next call of :meth:`step` comes where a schedule says to prune."""
        return any(due_step(schedule, self._step + 1) is not None for schedule in self._groups)

    def step(self) -> dict[str, Any] | None:
        """Count a training step; prune if it is due.

        Returns:
            What was added to :attr:`history`, or ``None`` if nothing was pruned. If anything
            fails, nothing is changed and the step is not counted.
        """
        with self.applied(self.plan()) as event:
            return event

    def plan(self) -> PlannedPruning:
        """Decide what the next step does; changes nothing."""
        now = self._step + 1
        decisions = self._decisions(now)
        masks: Masks = {}
        moved: dict[str, Tensor] = {}
        for decision in decisions:
            masks |= decision.masks
            moved |= decision.updates or {}
        space = self._seen(self._space.subset(masks))
        placed = {tensor.name: masks[tensor.name].to(tensor.leaf.device) for tensor in space}
        updates = {**space.values(), **moved} if moved else None
        check_decision(space, Decision(placed, updates))
        return PlannedPruning(now, placed, updates, [decision.info for decision in decisions])

    @contextmanager
    def applied(self, planned: PlannedPruning) -> Iterator[dict[str, Any] | None]:
        """Carry out a plan; if the body fails as well, everything is restored.

        Yields:
            What was added to :attr:`history`, or ``None`` if nothing was pruned.
        """
        with self._all_or_nothing(planned.masks, planned.updates):
            event = self._commit(planned) if planned.masks else None
            if event is None and self._optimizer is None:  # otherwise its hook has done it
                self._restore_zeros()
            self._step = planned.step
            yield event

    def remove(self) -> None:
        """Stop keeping zeros and zero gradients, e.g. before another pruner takes over."""
        self._held.remove()

    def state_dict(self) -> dict[str, Any]:
        """Step, history and masks, as tensors and plain values; ``torch.load`` reads them safely.

        Schedule, method and options are not included, nor are the states of model and optimizer.
        """
        hooked = [tensor.name for tensor in self._space if tensor.leaf_name != tensor.name]
        names = self._masks if self.mode == "zeros" else hooked
        masks = self._seen(self._space.subset(names)).masks()
        return {"step": self._step, "history": [dict(e) for e in self.history], "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; pruned entries are set to zero at once.

        With ``mode="hooks"`` this makes ``<name>_orig`` and ``<name>_mask`` in a new model, so
        it comes before the model's own ``load_state_dict``.

        Raises:
            AlignmentError: If a mask belongs to no tensor or has another shape.
            ArgumentError: If ``state`` is not a pruner's state; nothing is changed then.
        """
        loaded = PrunerState.of(state, self._space)
        with self._all_or_nothing(loaded.masks, None):
            if self.mode == "zeros":
                self._masks = loaded.masks
            elif loaded.masks:
                apply_decision(self._space.subset(loaded.masks), Decision(loaded.masks))
            self._step, self.history = loaded.step, loaded.history
            self._restore_zeros()
            self._held = self._hold()
            self._end_decay()

    def _goal_of(self, flops_target: float | None) -> Goal:
        # The method is constructed once now, so that a wrong option fails before hours of training.
        goal = {"amount": 0.0} if flops_target is None else flops_arguments(flops_target)
        trial = self._new_method(self._space, goal)
        if isinstance(trial, PruningMethod) and trial.needs_calibration:
            trial.required_calibration  # noqa: B018  # raises if there is none
        if flops_target is None:
            return SparsityGoal.of(trial)
        if self._calibration is None or len(self._groups) > 1:
            raise ArgumentError(
                "Expected a calibration and one schedule for all tensors with `flops_target`, "
                f"got {len(self._groups)} schedules and calibration={self._calibration!r}."
            )
        return FlopsGoal(flops_target, self._calibration)

    def _decisions(self, now: int) -> list[Decision]:
        decisions = []
        for schedule, group in self._groups.items():
            due = due_step(schedule, now)
            if due is None:
                continue
            space = self._seen(group)
            due_arguments = self._goal.arguments(space, schedule, due)
            if due_arguments is not None:
                decisions.append(decide_on(space, self._new_method(space, due_arguments)))
        return decisions

    def _new_method(self, space: ParameterSpace, goal: Mapping[str, Any]) -> BasePruningMethod:
        options = {**self._options, **goal}
        if self._calibration is not None and getattr(self._method, "needs_calibration", False):
            redrawn = self._calibration.redrawn(len(self.history))
            options["calibration"] = redrawn.with_space(space)
        return self._method(**options)

    def _commit(self, planned: PlannedPruning) -> dict[str, Any]:
        before = pruned_count(self.masks.values())
        space = self._seen(self._space.subset(planned.masks))
        if self.mode == "hooks":
            apply_decision(space, Decision(planned.masks, planned.updates))
        else:
            write_updates(space, planned.updates)
            self._masks = self._masks | planned.masks
            self._restore_zeros()
        self._held = self._hold()
        self._end_decay()
        event = {
            "step": planned.step,
            "sparsity": self.sparsity,
            "pruned": pruned_count(self.masks.values()) - before,
            "info": planned.info,
        }
        self.history = [*self.history, event]
        logger.info("Step %d: pruned to sparsity %.4f.", planned.step, event["sparsity"])
        return event

    def _seen(self, space: ParameterSpace) -> ParameterSpace:
        return space.with_masks(self._masks)

    def _restore_zeros(self) -> None:
        for tensor in self._space.subset(self._masks):
            set_zero(tensor.leaf, ~self._masks[tensor.name])

    def _hold(self) -> HeldZeros:
        masks = {tensor.leaf: tensor.mask for tensor in self._seen(self._space)}
        sparse = {leaf: mask for leaf, mask in masks.items() if not bool(mask.all())}
        if not sparse:
            return HeldZeros()
        if self._optimizer is not None:
            own = ids_in(self._optimizer)
            return keep_sparse(self._optimizer, {p: m for p, m in sparse.items() if id(p) in own})
        hooks = hold_gradients_of({p: ~mask for p, mask in sparse.items()})
        weakref.finalize(self, hooks.remove)
        return hooks

    def _end_decay(self) -> None:
        if self._optimizer is not None and not self._decay_after and self.finished:
            end_weight_decay(self._optimizer, [tensor.leaf for tensor in self._space])

    @contextmanager
    def _all_or_nothing(self, masks: Masks, updates: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Restore model, optimizer and pruner if the body, which brings ``masks``, fails."""
        ours = {key: vars(self)[key] for key in ("_step", "history", "_masks", "_held")}
        space = self._space.subset(masks)
        moved = [] if updates is None else [tensor.leaf for tensor in space]
        seen = self._seen(self._space.subset(self._masks | masks if masks else ()))
        zeros = {tensor.leaf: ~(masks.get(tensor.name, tensor.mask)) for tensor in seen}
        with ExitStack() as stack:
            stack.enter_context(zeroing_undone(zeros, self._optimizer, moved))
            if self.mode == "hooks":
                stack.enter_context(all_or_nothing(space.pairs(), values=False))
            try:
                yield
            except BaseException:
                if self._held is not ours["_held"]:
                    self._held.remove()
                vars(self).update(ours)
                raise
        if self._held is not ours["_held"]:
            ours["_held"].remove()
