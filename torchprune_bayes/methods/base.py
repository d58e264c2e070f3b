"""Base class of all methods: decisions without side effects, and PyTorch's pruning API.

In plain words: ``decide`` is pure. ``compute_mask`` is what PyTorch calls; it knows the
remaining values only, so it checks that they are the calibration's, decides, writes the update of
the kept ones into the same ``Parameter`` objects, and lets go of model, data and curvature, because
PyTorch keeps the method on the module and pickles it.
"""

from __future__ import annotations

import numbers
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from torchprune_bayes._checks import check_amount, check_choice, check_count
from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.methods.decisions import check_decision, check_prunable, write_updates
from torchprune_bayes.methods.module_state import all_or_nothing, same_order
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision, ParameterPairs

SCOPES = ("global", "layer")


class PruningMethod(BasePruningMethod):
    """Base class of the methods; works wherever a ``BasePruningMethod`` does.

    Laws, run over the whole registry by the contract tests: ``decide`` changes nothing; exactly
    ``round(amount * remaining)`` entries are pruned; pruned entries remain pruned; the same seed
    gives the same masks; dtype and device of tensors are kept.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune; with
            ``scope="layer"`` a fraction, or the number for each tensor by qualified name.
        calibration: Data, model and loss; the parameters are the calibration's.
        scope: ``"global"`` ranks all tensors together; ``"layer"`` prunes the fraction ``amount``
            of each.

    Raises:
        ArgumentError: If an argument has an impossible value.
        ArgumentTypeError: If ``amount`` is no number.

    Example:
        >>> from torchprune_bayes.methods._target import Target
        >>> class First(PruningMethod):
        ...     needs_calibration = False
        ...
        ...     def decide(self, space):
        ...         masks = space.masks()
        ...         scores = {name: torch.zeros(mask.shape) for name, mask in masks.items()}
        ...         return Decision(Target(masks, self.amount).keep(0, scores, masks))
        >>> layer = nn.Linear(4, 1)
        >>> First.apply(layer, "weight", amount=0.5)._tensor_name
        'weight'
        >>> layer.weight_mask
        tensor([[0., 0., 1., 1.]])
    """

    PRUNING_TYPE = "unstructured"
    needs_calibration = True
    always_moves = False
    """Whether weights that remain move whatever the options are, so that it is not scores alone."""

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        calibration: Calibration | None = None,
        scope: str = "global",
    ) -> None:
        check_choice("scope", scope, SCOPES)
        _check_amount_in(scope, amount)
        self.amount = amount
        self.calibration = calibration
        self.scope = scope
        self._planned: Tensor | None = None

    @abstractmethod
    def decide(self, space: ParameterSpace) -> Decision:
        """Choose what to prune among the remaining entries of ``space``; changes nothing."""

    @property
    def space(self) -> ParameterSpace:
        """The calibration's parameters.

        Raises:
            ArgumentTypeError: If there is no calibration.
        """
        return self.required_calibration.space

    def space_for(self, params: ParameterPairs | None) -> ParameterSpace:
        """The tensors to decide on where ``params`` are asked for.

        Args:
            params: ``(module, name)`` pairs; ``None`` takes the calibration's.

        Raises:
            AlignmentError: If they are not the calibration's.
            ArgumentTypeError: If there are neither pairs nor a calibration.
        """
        if self.needs_calibration:
            if params is not None:
                self.space.check_same_tensors(params)
            return self.space
        return space_of_pairs(params, type(self).__name__)

    @property
    def required_calibration(self) -> Calibration:
        """The calibration.

        Raises:
            ArgumentTypeError: If none was given.
        """
        if self.calibration is None:
            kind = type(self).__name__
            raise ArgumentTypeError(
                f"Expected `calibration=Calibration(model, data, loss_fn, params=...)` for {kind}, "
                "got none."
            )
        return self.calibration

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """PyTorch's pruning API: decide on the remaining entries ``t`` and return their mask.

        Args:
            t: Values from PyTorch, the remaining entries where ``default_mask`` is one.
            default_mask: Shaped like ``t``, zero where an entry is pruned already.

        Returns:
            The mask, shaped like ``default_mask`` and of its dtype.

        Raises:
            AlignmentError: If ``t`` is not the remaining entries of the calibration's parameters.
        """
        remaining = default_mask == 1
        keep = self._planned
        if keep is None:
            space, decision = self._decide_on(t[remaining])
            keep = RemainingVector(space.masks()).gather(decision.masks)
            write_updates(space, decision.updates)
        self.release()
        mask = torch.zeros_like(default_mask)
        mask[remaining] = keep.to(mask)
        return mask

    def prune(
        self,
        t: Tensor,
        default_mask: Tensor | None = None,
        importance_scores: Tensor | None = None,
    ) -> Tensor:
        """Return a pruned copy of ``t`` with the kept entries updated; the model is not changed.

        Args:
            t: A tensor of the calibration if it is the only one there; else a flat vector of the
                remaining entries of all its tensors.
            default_mask: Shaped like ``t``, zero where an entry is pruned already.
            importance_scores: Must be ``None``: the method computes its own.

        Raises:
            AlignmentError: If ``t`` is not the remaining entries of the calibration's parameters.
            ArgumentError: If importance scores are passed.
        """
        self._refuse_scores(importance_scores)
        remaining = torch.ones_like(t).bool() if default_mask is None else default_mask == 1
        space, decision = self._decide_on(t[remaining])
        vector = RemainingVector(space.masks())
        values = t[remaining] if decision.updates is None else vector.gather(decision.updates).to(t)
        pruned = torch.zeros_like(t)
        pruned[remaining] = values * vector.gather(decision.masks).to(t.device)
        return pruned

    def decide_beside(self, space: ParameterSpace) -> Decision:
        """:meth:`decide` on the device of the arithmetic, with masks and updates on the tensors'.

        That is where the calibration computes, which need not be where the model is; without one
        where the tensors are, or the CPU if they are on several devices; and the CPU wherever there
        is no float64. Scores remain there.

        Args:
            space: The tensors, on any devices.
        """
        decision = self.decide(space.at(self._place(space)))
        return replace(
            decision,
            masks=_beside(space, decision.masks),
            updates=None if decision.updates is None else _beside(space, decision.updates),
        )

    def _place(self, space: ParameterSpace) -> torch.device:
        if self.calibration is not None:
            return float64_device(self.calibration.device)
        return float64_device(space.devices[0] if len(space.devices) == 1 else "cpu")

    def release(self) -> None:
        """Let go of model, data and curvature."""
        self.calibration = None
        self._planned = None

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        *args: Any,
        importance_scores: Tensor | None = None,
        **kwargs: Any,
    ) -> BasePruningMethod:
        """Prune one tensor, as ``BasePruningMethod.apply`` does; nothing is changed on failure.

        Args:
            module: Module that holds the tensor.
            name: Name of the tensor in the module.
            args: Arguments of the method.
            importance_scores: Must be ``None``: the method computes its own.
            kwargs: Arguments of the method.

        Returns:
            The hook: the method, or a container of it and of those applied before.

        Raises:
            AlignmentError: If the tensor is not one of the calibration's.
            ArgumentError: If importance scores are passed.
            ParameterError: If the tensor cannot be pruned.
        """
        cls._refuse_scores(importance_scores)
        method = cls(*args, **kwargs)
        space = method._space_of(module, name)
        decision = method._checked_decision(space)
        method._planned = RemainingVector(space.masks()).gather(decision.masks)
        with all_or_nothing(space.pairs(), values=decision.updates is not None), same_order(module):
            write_updates(space, decision.updates)
            # PyTorch builds the method by calling its first argument, so a plan can be handed in.
            return BasePruningMethod.apply.__func__(lambda: method, module, name)  # type: ignore[attr-defined]

    def _space_of(self, module: nn.Module, name: str) -> ParameterSpace:
        if not self.needs_calibration:
            return ParameterSpace.of_pairs([(module, name)])
        self.calibration = self.required_calibration.restricted(module, name)
        return self.space

    def _decide_on(self, flat: Tensor) -> tuple[ParameterSpace, Decision]:
        space = self.space if self.needs_calibration else self._space_of_vector(flat)
        return space, self._checked_decision(space, shown=flat)

    def _space_of_vector(self, flat: Tensor) -> ParameterSpace:
        if self.scope == "layer":
            raise ArgumentError(
                "Expected scope='global' in prune.global_unstructured, which shows a method no "
                "layers, got 'layer': use prune_global."
            )
        holder = nn.Module()
        holder.weights = nn.Parameter(flat.detach())
        return ParameterSpace(holder, [(holder, "weights")])

    def _checked_decision(self, space: ParameterSpace, shown: Tensor | None = None) -> Decision:
        check_prunable(space)
        if shown is not None:
            space.check_alignment(shown)
        decision = self.decide_beside(space)
        check_decision(space, decision)
        return decision

    @classmethod
    def _refuse_scores(cls, importance_scores: Tensor | None) -> None:
        if importance_scores is not None:
            raise ArgumentError(f"Expected no importance_scores: {cls.__name__} computes its own.")


def space_of_pairs(params: ParameterPairs | None, kind: str) -> ParameterSpace:
    """The space of pairs for a method ``kind`` that decides from the weights alone.

    Raises:
        ArgumentTypeError: If there are none.
    """
    if params is None:
        raise ArgumentTypeError(
            f"Expected a model or (module, tensor name) pairs for {kind}, got None: pass the "
            "model, or `calibration=`, which knows its own."
        )
    return ParameterSpace.of_pairs(params)


def _beside(space: ParameterSpace, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move values to the devices of the tensors of the same names; others are unchanged."""
    places = {tensor.name: tensor.leaf.device for tensor in space}
    return {name: value.to(places.get(name, value.device)) for name, value in tensors.items()}


def _check_amount_in(scope: str, amount: float | int | Mapping[str, int]) -> None:
    if scope == "layer" and isinstance(amount, Mapping):
        for name, count in amount.items():
            check_count(f"amount['{name}']", count, minimum=0)
        return
    check_amount(amount)
    if scope == "layer" and isinstance(amount, numbers.Integral):
        raise ArgumentError(
            "Expected a fraction, or a count for each tensor by name, for `amount` with "
            f"scope='layer', got the count {amount}."
        )
