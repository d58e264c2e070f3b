"""Weight decay with a strength for each weight: the gradient of a Gaussian prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchprune_bayes._checks import check_positive
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.training._optimizers import bare_optimizer, check_in_optimizer


class PriorDecay:
    """Add ``c δ_i w_i`` to the gradients before every ``optimizer.step()``.

    With ``c = T/N`` and a loss that is a mean over ``N`` samples this is training on the log joint
    ``−L/T − ½ Σ δ_i w_i²``: for every optimizer the same steps as with that penalty in the loss.
    The hook sees gradients as ``step`` does, after loss scaling is undone, accumulation and
    clipping. Parameters without a gradient are skipped.

    An explicit step is stable only up to some strength, so ``c δ_i`` is capped at ``1/lr``,
    with which one plain gradient step sets the weight to zero.

    Args:
        optimizer: Any ``torch.optim`` optimizer, wrapped by accelerate or not; closures are
            supported.
        precisions: ``δ`` by parameter, each of a shape that broadcasts over its parameter's.
        factor: ``c``.
        decoupled: Whether ``w`` shrinks by ``1 − lr c δ`` instead, as in AdamW. With an adaptive
            optimizer the weights then do not converge to the maximum of the log joint.

    Attributes:
        precisions: ``δ`` by parameter; may be changed at any time.
        factor: ``c``, likewise.

    Raises:
        AlignmentError: If a parameter is not in the optimizer.
        ArgumentError: If the optimizer decays one of them itself, or ``factor`` is not positive.
        ArgumentTypeError: If the optimizer takes no hooks.

    Cost: one pass over the weights, and a copy of one tensor where ``δ`` is as large.

    Example:
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 2.0)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> decay = PriorDecay(optimizer, {layer.weight: torch.tensor(3.0)}, factor=0.5)
        >>> layer(torch.zeros(1, 1)).sum().backward()
        >>> optimizer.step()
        >>> layer.weight  # 2 − 0.1 · 0.5 · 3 · 2
        Parameter containing:
        tensor([[1.7000]], requires_grad=True)
        >>> decay.remove()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        precisions: Mapping[Tensor, Tensor],
        factor: float,
        *,
        decoupled: bool = False,
    ) -> None:
        check_positive("factor", factor)
        optimizer = bare_optimizer(optimizer)
        check_in_optimizer(optimizer, precisions)
        _check_no_other_decay(optimizer, precisions)
        self.precisions = dict(precisions)
        self.factor = factor
        hook = self._shrink if decoupled else self._before_step
        self._handle: RemovableHandle = optimizer.register_step_pre_hook(hook)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # args[0] is the optimizer; with a closure, gradients are computed inside the step.
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._followed(args[1], optimizer), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._followed(kwargs["closure"], optimizer)}
        self._pull(optimizer)
        return None

    def _followed(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def closure_and_prior() -> Any:
            loss = closure()
            self._pull(optimizer)
            return loss

        return closure_and_prior

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer) -> None:
        for parameter, strength, _ in self._decayed(optimizer):
            assert parameter.grad is not None
            # Fused optimizers get scaled gradients and unscale them themselves.
            unscale = getattr(optimizer, "grad_scale", None)
            scaled = strength if unscale is None else strength * unscale
            parameter.grad.addcmul_(scaled.to(parameter.grad), parameter)

    @torch.no_grad()
    def _shrink(self, optimizer: Optimizer, *_: Any) -> None:
        for parameter, strength, lr in self._decayed(optimizer):
            parameter.mul_((1.0 - lr * strength).to(parameter))

    def _decayed(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor, float]]:
        decayed = []
        for group in optimizer.param_groups:
            lr = float(group.get("lr", 0.0))
            for parameter in group["params"]:
                precision = self.precisions.get(parameter)
                if precision is not None and parameter.grad is not None:
                    strength = precision * self.factor
                    decayed.append(
                        (parameter, strength.clamp(max=1.0 / lr) if lr else strength, lr)
                    )
        return decayed


def _check_no_other_decay(optimizer: Optimizer, parameters: Mapping[Tensor, Tensor]) -> None:
    ours = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        if group.get("weight_decay") and any(id(p) in ours for p in group["params"]):
            raise ArgumentError(
                "Expected weight_decay=0 in the optimizer for parameters under a prior, got "
                f"{group['weight_decay']}."
            )
