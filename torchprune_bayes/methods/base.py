"""What every method shares: deciding without changing anything, and the host's door.

In plain words: ``decide`` is pure. ``compute_mask`` is what the host calls; it knows only the live
values, so it checks that they are the calibration's, decides, writes the update of the survivors
into the same ``Parameter`` objects, and lets go of model, data and curvature, because the host
keeps the method on the module and pickles it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torchprune_bayes._checks import check_amount, check_choice
from torchprune_bayes._numerics.live_vector import LiveVector
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision

SCOPES = ("global", "layer")


class PruningMethod(prune.BasePruningMethod):
    """Base class of the methods; works wherever a ``BasePruningMethod`` does.

    Laws, run over the whole registry by the contract tests: ``decide`` changes nothing; exactly
    ``round(amount * live)`` entries go; entries pruned before stay pruned; the same seed gives the
    same masks; dtype and device of tensors stay.

    Args:
        amount: Fraction (float) or number (int) of the live entries to prune.
        calibration: Data, model and loss; the parameters are the calibration's.
        scope: ``"global"`` ranks all tensors together; ``"layer"`` prunes the fraction ``amount``
            of each.
    """

    PRUNING_TYPE = "unstructured"
    needs_calibration = True

    def __init__(
        self, amount: float | int, *, calibration: Calibration | None = None, scope: str = "global"
    ) -> None:
        check_amount(amount)
        check_choice("scope", scope, SCOPES)
        if scope == "layer" and isinstance(amount, int):
            raise ArgumentError(
                f"Expected a fraction for `amount` with scope='layer', got the count {amount}."
            )
        self.amount = amount
        self.calibration = calibration
        self.scope = scope
        self._planned: Tensor | None = None

    @abstractmethod
    def decide(self, space: ParameterSpace) -> Decision:
        """Choose what to prune among the live entries of ``space``; changes nothing."""

    @property
    def space(self) -> ParameterSpace:
        """The calibration's parameters.

        Raises:
            ArgumentTypeError: If there is no calibration.
        """
        return self.required_calibration.space

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
        """The host's door: decide on the live entries ``t`` and return their mask.

        Raises:
            AlignmentError: If ``t`` is not the live entries of the calibration's parameters.
        """
        planned = self._planned
        if planned is None:
            space = self.space
            space.check_hookable()
            space.check_alignment(t[default_mask == 1])
            decision = self.decide(space)
            planned = LiveVector(space.masks()).gather(decision.masks)
            write_updates(space, decision.updates)
        self.release()
        mask = torch.zeros_like(default_mask)
        mask[default_mask == 1] = planned.to(mask)
        return mask

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
    ) -> prune.BasePruningMethod:
        """Prune one tensor, as ``BasePruningMethod.apply`` does; nothing is changed on failure.

        Args:
            module: Module that holds the tensor.
            name: Name of the tensor in the module.
            args: Arguments of the method.
            importance_scores: Must be ``None``: the method computes its own.
            kwargs: Arguments of the method.

        Raises:
            ArgumentError: If importance scores are passed.
        """
        if importance_scores is not None:
            raise ArgumentError(f"Expected no importance_scores: {cls.__name__} computes its own.")
        method = cls(*args, **kwargs)
        space = method._space_of(module, name)
        space.check_hookable()
        decision = method.decide(space)
        method._planned = LiveVector(space.masks()).gather(decision.masks)
        hooks = module._forward_pre_hooks.copy()
        before = space[0].leaf.detach().clone()
        try:
            write_updates(space, decision.updates)
            # The host builds the method by calling its first argument, so a plan can be handed in.
            return prune.BasePruningMethod.apply.__func__(lambda: method, module, name)  # type: ignore[attr-defined]
        except BaseException:
            # The host drops an earlier hook before it tries the new method.
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(hooks)
            with torch.no_grad():
                space[0].leaf.copy_(before)
            raise

    def _space_of(self, module: nn.Module, name: str) -> ParameterSpace:
        if not self.needs_calibration:
            return ParameterSpace.of_pairs([(module, name)])
        self.calibration = self.required_calibration.restricted(module, name)
        return self.space


def write_updates(space: ParameterSpace, updates: Mapping[str, Tensor] | None) -> None:
    """Write new values into the same ``Parameter`` objects, so that optimizers stay valid."""
    if updates is None:
        return
    with torch.no_grad():
        for tensor in space:
            tensor.leaf.copy_(updates[tensor.name])
