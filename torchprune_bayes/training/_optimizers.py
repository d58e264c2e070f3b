"""What is inside an optimizer: the one that steps, its parameters, its moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from torchprune_bayes.errors import AlignmentError, ArgumentTypeError

MOMENTS = frozenset(
    {
        "momentum_buffer",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "sum",
        "prev",
        "ax",
        "z",
    }
)
"""Names under which optimizers keep running values of each entry's gradients or weights."""


def bare_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that steps, out of wrappers such as accelerate's.

    Raises:
        ArgumentTypeError: If there is none that takes hooks.

    Example:
        >>> class Wrapper:
        ...     def __init__(self, optimizer):
        ...         self.optimizer = optimizer
        >>> from torch.optim import SGD
        >>> inner = SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        >>> bare_optimizer(Wrapper(inner)) is inner
        True
    """
    inner = optimizer
    for _ in range(10):  # nested wrappers, with a limit in case of a cycle
        if _takes_hooks(inner):
            assert isinstance(inner, Optimizer)
            return inner
        inner = getattr(inner, "optimizer", None)
    raise ArgumentTypeError(
        f"Expected a torch.optim optimizer, got {type(optimizer).__name__}, which takes no hooks "
        "and wraps none that does: pass the optimizer that updates the weights."
    )


def check_in_optimizer(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Refuse parameters that the optimizer does not have.

    Raises:
        AlignmentError: In this case.
    """
    own = ids_in(optimizer)
    missing = [parameter for parameter in parameters if id(parameter) not in own]
    if missing:
        raise AlignmentError(
            "Expected parameters of the optimizer, got "
            f"{len(missing)} others, the first of shape {tuple(missing[0].shape)}."
        )


def ids_in(optimizer: Optimizer) -> set[int]:
    """``id`` of every parameter that the optimizer has."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def end_weight_decay(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Set the weight decay to zero in every group that has one of the parameters."""
    ours = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        if "weight_decay" in group and any(id(p) in ours for p in group["params"]):
            group["weight_decay"] = 0.0


def moments_of(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """Running values of a parameter's entries: momentum, Adam's moments and their like.

    Recognised by their names in ``torch.optim``, which others use too. Any other state is
    unknown: a preconditioner can have the shape of a square weight, and codes of 8 or 4
    bits are not values.
    """
    state = optimizer.state.get(parameter, {})
    return [value for key, value in state.items() if key in MOMENTS and _is_like(value, parameter)]


def lbfgs_directions(optimizer: Optimizer) -> list[Tensor]:
    """What L-BFGS remembers of past steps, vectors over all its parameters in their order."""
    if not isinstance(optimizer, LBFGS):
        return []
    directions = []
    for state in optimizer.state.values():
        previous = (state.get("d"), state.get("prev_flat_grad"))
        directions += [value for value in previous if isinstance(value, Tensor)]
        directions += [value for key in ("old_dirs", "old_stps") for value in state.get(key) or ()]
    return directions


def local_part(tensor: Tensor) -> Tensor:
    """The tensor itself, or the local part of a sharded one."""
    local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def _takes_hooks(optimizer: Any) -> bool:
    # The mark of `Optimizer.__init__`: a step without it runs no hooks, even if they are
    # registered.
    if not isinstance(optimizer, Optimizer) or not getattr(type(optimizer).step, "hooked", False):
        return False
    try:  # a wrapper that never called `Optimizer.__init__` has no place for hooks
        optimizer.register_step_post_hook(lambda *_: None).remove()
    except AttributeError:
        return False
    return True


def _is_like(value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return False
    # Packed states are subclasses that look like floats.
    return type(local_part(value)) in (Tensor, nn.Parameter) and value.is_floating_point()
