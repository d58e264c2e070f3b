"""Pruning along a schedule, in any training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchprune_bayes._checks import check_choice, check_count
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.methods.base import PruningMethod, check_decision, write_updates
from torchprune_bayes.methods.host import apply_decision, decide_on, unstructured_method
from torchprune_bayes.params import ParameterSpace, prunable_parameters
from torchprune_bayes.training._due import (
    Schedules,
    due_step,
    entry_count,
    pruned_count,
    schedule_groups,
    shortfall,
)
from torchprune_bayes.training.keep_sparse import check_in_optimizer, keep_sparse, set_zero
from torchprune_bayes.types import Decision, Masks, ParameterPairs

logger = logging.getLogger("torchprune_bayes")

MODES = ("zeros", "hooks")


class GradualPruner:
    """Prune step by step while a model is trained; call :meth:`step` after ``optimizer.step()``.

    Steps are counted from 1, so step ``n`` comes after ``n`` updates; what a schedule has due at 0
    is done at the first call. At each due step exactly ``round(sparsity * entries)`` are pruned in
    all, and gradients and curvature are taken anew at the weights of the moment, from another draw
    of the calibration data. All groups of tensors decide before anything is changed.

    There are two ways to keep what is pruned:

    * ``mode="zeros"``, the default: weights stay plain, zeros are the mask, and the pruner holds
      the masks. Names in ``state_dict`` stay, so that checkpoints, ``from_pretrained``,
      ``copy.deepcopy`` and averaged models work. Without ``optimizer`` the zeros hold from one
      call of :meth:`step` to the next ``optimizer.step()``; with it, throughout.
    * ``mode="hooks"``: ``<name>_orig`` and ``<name>_mask``, as ``torch.nn.utils.prune`` does.

    Args:
        params: ``(module, name)`` pairs; or a model, for its
            :func:`~torchprune_bayes.prunable_parameters`; ``None`` takes the calibration's.
        method: A pruning method that takes ``amount``, ours or the host's, or a registered name.
        schedule: One :class:`~torchprune_bayes.schedules.Schedule` for all tensors together, or
            one for each tensor, by qualified name or pair. Tensors whose schedules are equal are
            pruned together.
        calibration: Data, model and loss, for methods that need them.
        optimizer: Its state is held at zero where the weights are, see
            :func:`~torchprune_bayes.keep_sparse`.
        mode: ``"zeros"`` or ``"hooks"``.
        options: Further arguments of the method.

    Attributes:
        history: A dict of plain values for each pruning: ``step``, ``sparsity``, ``pruned``
            (entries) and ``info``, a list of what the method reported for each group.

    Raises:
        AlignmentError: If ``params`` are not the calibration's or not in the optimizer.
        ArgumentError: If an argument or option has an impossible value, or tensors have no
            schedule.
        ArgumentTypeError: If something is missing or of the wrong type.
        ParameterError: If a tensor cannot be pruned.

    Cost: at a due step that of the method; at others one elementwise pass over the weights, or
    with ``optimizer`` that of :func:`~torchprune_bayes.keep_sparse`. One byte per weight.

    Example:
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
        **options: Any,
    ) -> None:
        check_choice("mode", mode, MODES)
        _check_options(options)
        self.mode = mode
        self.history: list[dict[str, Any]] = []
        self._space = _space_of(params, calibration)
        self._groups = schedule_groups(schedule, self._space)
        self._method: Callable[..., BasePruningMethod] = unstructured_method(method)
        self._options = options
        self._calibration = calibration
        self._optimizer = optimizer
        self._step = 0
        self._masks: Masks = {}
        self._handle: RemovableHandle | None = None
        # Made once now, so that a wrong option shows before hours of training.
        trial = self._new_method(self._space, 0.0)
        if isinstance(trial, PruningMethod) and trial.needs_calibration:
            trial.required_calibration  # noqa: B018  # raises if there is none
        self._by_layer = getattr(trial, "scope", "global") == "layer"
        pattern = getattr(trial, "pattern", None)
        self._together = pattern.size if pattern is not None and pattern.takes_whole_groups else 1
        if optimizer is not None:
            check_in_optimizer(optimizer, [tensor.leaf for tensor in self._space])

    @property
    def space(self) -> ParameterSpace:
        """The tensors, in order; masks that only the pruner holds are not seen in it."""
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
        """Whether the final sparsity is reached, so that no later step prunes."""
        return not any(
            self._missing(self._seen(group), schedule.final)
            for schedule, group in self._groups.items()
        )

    @property
    def due(self) -> bool:
        """Whether the next call of :meth:`step` comes where a schedule says to prune."""
        return any(due_step(schedule, self._step + 1) is not None for schedule in self._groups)

    def step(self) -> dict[str, Any] | None:
        """Count a training step; prune if it is due.

        Returns:
            What was added to :attr:`history`, or ``None`` if nothing was pruned. If the method
            raises, nothing is pruned and the step is not counted.
        """
        if self._handle is None:  # otherwise the optimizer's hook has done it
            self._restore_zeros()
        now = self._step + 1
        decisions = self._decisions(now)
        event = None
        if decisions:
            before = pruned_count(self.masks.values())
            self._commit(decisions)
            event = {
                "step": now,
                "sparsity": self.sparsity,
                "pruned": pruned_count(self.masks.values()) - before,
                "info": [decision.info for decision in decisions],
            }
            self.history.append(event)
            logger.info("Step %d: pruned to sparsity %.4f.", now, event["sparsity"])
        self._step = now
        return event

    def state_dict(self) -> dict[str, Any]:
        """Step, history and masks, as tensors and plain values; ``torch.load`` reads them safely.

        Schedule, method and options are not in it, nor is what the model and the optimizer save.
        """
        hooked = [tensor.name for tensor in self._space if tensor.leaf_name != tensor.name]
        names = self._masks if self.mode == "zeros" else hooked
        masks = self._seen(self._space.subset(names)).masks()
        return {"step": self._step, "history": [dict(e) for e in self.history], "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the model's entries are set to zero at once.

        With ``mode="hooks"`` this makes ``<name>_orig`` and ``<name>_mask`` in a fresh model, so
        it comes before the model's own ``load_state_dict``.

        Raises:
            AlignmentError: If a mask belongs to no tensor or has another shape.
            ArgumentError: If ``state`` is no state of a pruner.
        """
        _check_state(state, self._space)
        space = self._space.subset(state["masks"])
        masks = {t.name: state["masks"][t.name].to(t.leaf.device, torch.bool) for t in space}
        if self.mode == "zeros":
            self._masks = masks
        elif masks:
            apply_decision(space, Decision(masks))
        self._step = int(state["step"])
        self.history = [dict(event) for event in state["history"]]
        self._restore_zeros()
        self._protect()

    def _decisions(self, now: int) -> list[Decision]:
        decisions = []
        for schedule, group in self._groups.items():
            due = due_step(schedule, now)
            if due is None:
                continue
            space = self._seen(group)
            amount = self._missing(space, schedule(due))
            if amount:
                decisions.append(decide_on(space, self._new_method(space, amount)))
        return decisions

    def _new_method(
        self, space: ParameterSpace, amount: float | dict[str, int]
    ) -> BasePruningMethod:
        options = dict(self._options)
        if self._calibration is not None and getattr(self._method, "needs_calibration", False):
            fresh = self._calibration.fresh(len(self.history))
            options["calibration"] = fresh.with_space(space)
        return self._method(amount=amount, **options)

    def _missing(self, space: ParameterSpace, sparsity: float) -> int | dict[str, int]:
        masks = space.masks()
        if not self._by_layer:
            return shortfall(masks.values(), sparsity, self._together)
        counts = {name: shortfall([mask], sparsity, self._together) for name, mask in masks.items()}
        return counts if any(counts.values()) else 0

    def _commit(self, decisions: list[Decision]) -> None:
        masks: Masks = {}
        moved: dict[str, Tensor] = {}
        for decision in decisions:
            masks |= decision.masks
            moved |= decision.updates or {}
        space = self._seen(self._space.subset(masks))
        joined = Decision(masks, {**space.values(), **moved} if moved else None)
        if self.mode == "hooks":
            apply_decision(space, joined)
        else:
            check_decision(space, joined)
            write_updates(space, joined.updates)
            self._masks = self._masks | {t.name: masks[t.name].to(t.leaf.device) for t in space}
            self._restore_zeros()
        self._protect()

    def _seen(self, space: ParameterSpace) -> ParameterSpace:
        return space.with_masks(self._masks)

    def _restore_zeros(self) -> None:
        for tensor in self._space.subset(self._masks):
            set_zero(tensor.leaf, ~self._masks[tensor.name])

    def _protect(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._optimizer is not None:
            masks = {tensor.leaf: tensor.mask for tensor in self._seen(self._space)}
            sparse = {leaf: mask for leaf, mask in masks.items() if not bool(mask.all())}
            self._handle = keep_sparse(self._optimizer, sparse)


def _space_of(
    params: ParameterPairs | nn.Module | None, calibration: Calibration | None
) -> ParameterSpace:
    if calibration is None:
        if params is None:
            raise ArgumentTypeError("Expected `params` or `calibration=`, got neither.")
        if isinstance(params, nn.Module):
            return ParameterSpace(params)
        return ParameterSpace.of_pairs(params)
    if params is not None:
        pairs = prunable_parameters(params) if isinstance(params, nn.Module) else params
        calibration.space.check_same_tensors(pairs)
    return calibration.space


def _check_options(options: Mapping[str, Any]) -> None:
    for name, reason in (("amount", "the schedule gives it"), ("curvature", "it is fitted anew")):
        if name in options:
            raise ArgumentError(f"Expected no `{name}`, because {reason}, got one.")


def _check_state(state: Mapping[str, Any], space: ParameterSpace) -> None:
    if set(state) != {"step", "history", "masks"}:
        raise ArgumentError(
            f"Expected the keys history, masks and step in a pruner's state, got {sorted(state)}."
        )
    check_count("step", state["step"], minimum=0)
    for tensor in space.subset(state["masks"]):
        shape = state["masks"][tensor.name].shape
        if shape != tensor.leaf.shape:
            raise AlignmentError(
                f"Expected a mask of shape {tuple(tensor.leaf.shape)} for `{tensor.name}`, "
                f"got {tuple(shape)}."
            )
