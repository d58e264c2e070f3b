"""Carrying an optimizer and averaged copies over to a shrunk model.

In plain words: shrinking gives a model new, smaller parameters. An optimizer that was training it
still holds the old ones, with their momenta. Here the new parameters take their places, in the same
parameter groups, and every momentum keeps the entries of the channels and heads that remain. From
then on they change exactly as they would in the masked model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from torchprune_bayes.errors import AlignmentError, ArgumentTypeError, ParameterError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured._replacement import Change
from torchprune_bayes.structured.slicing import ShrinkPlan, apply_plan
from torchprune_bayes.wiring.tensors import all_tensors

_POWERS = {
    "momentum_buffer": -1,
    "exp_avg": -1,
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
    "exp_inf": -1,
    "square_avg": -2,
    "grad_avg": -1,
    "sum": -2,
    "prev": -1,
    "ax": 1,
    "acc_delta": 2,
    "step_size": 0,
}
"""State of PyTorch's optimizers as powers of a parameter: sums of gradients are -1, squares -2."""


def slice_optimizer(
    optimizer: Optimizer,
    plan: ShrinkPlan,
    parameters: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
) -> None:
    """Let an optimizer continue with the parameters of the shrunk model.

    Parameter groups keep their identity, order and settings; the new parameters stand where the old
    ones stood. State of the parameter's shape (momentum of SGD; both moments of Adam and AdamW, and
    AMSGrad's maximum) is cut as the parameter was, numbers such as the step are kept. Where the
    plan multiplies a parameter by ``c``, as queries and keys of heads with fewer dimensions, its
    gradients are those of before divided by ``c``: first moments are divided by ``c`` and second
    ones by ``c²``. The learning rate stays, so that these parameters move as such ones do, and
    all others exactly as in the masked model.

    Args:
        optimizer: Changed in place; wrappers that pass ``param_groups`` and ``state`` on are fine.
        plan: The cut that led from the old parameters to the new ones.
        parameters: Old and new parameter by the name that the plan uses, as given by
            :func:`apply_plan` in ``Change.parameters``. Those that the optimizer does not hold are
            skipped.

    Raises:
        ParameterError: If some state cannot be cut along, such as the factored moments of Adafactor
            or the history of L-BFGS, or is of an unknown kind where its parameter is rescaled.
        AlignmentError: If a cut parameter has not the shape of the new one. In both cases nothing
            is changed.

    Cost: memory of the state that survives.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> kept = {"0.weight": {0: torch.tensor([0, 2])}}
        >>> plan = ShrinkPlan(kept, {"0.weight": (3, 2)}, {})
        >>> old = model[0].weight
        >>> new = nn.Parameter(plan.cut("0.weight", old.detach()))
        >>> slice_optimizer(optimizer, plan, {"0.weight": (old, new)})
        >>> optimizer.param_groups[0]["params"][0] is new
        True
        >>> optimizer.state[new]["exp_avg"].shape
        torch.Size([2, 2])
    """
    if isinstance(optimizer, LBFGS) and optimizer.state:
        raise ParameterError(
            "Expected an optimizer with separate state for each parameter, got LBFGS, whose "
            "history runs across all of them: build a new one after shrinking."
        )
    names = {id(old): (name, new) for name, (old, new) in parameters.items()}
    moved: dict[Any, Any] = {}
    for parameter, state in optimizer.state.items():
        if id(parameter) in names:
            name, new = names[id(parameter)]
            moved[new] = _cut_state(state, parameter, plan, name)
        else:
            moved[parameter] = state
    for name, (old, new) in parameters.items():
        if plan.cut(name, old.detach()).shape != new.shape:
            raise AlignmentError(
                f"Expected the new `{name}` to be of the shape that the plan leaves of "
                f"{tuple(old.shape)}, got {tuple(new.shape)}."
            )
    for group in optimizer.param_groups:
        group["params"][:] = [
            names[id(parameter)][1] if id(parameter) in names else parameter
            for parameter in group["params"]
        ]
    optimizer.state.clear()
    optimizer.state.update(moved)


def slice_ema(ema: nn.Module, plan: ShrinkPlan) -> Change:
    """Cut an averaged copy of a model as the model itself was cut.

    Args:
        ema: A plain copy of the model, or a wrapper that holds it as ``module``, such as PyTorch's
            ``AveragedModel`` or timm's ``ModelEmaV3``; changed in place.
        plan: The cut of the model.

    Returns:
        The change, which can be undone.

    Raises:
        ArgumentTypeError: If ``ema`` is no module.
        ArgumentError: If the copy is not of the shape that the model had before the cut.
        ParameterError: If a layer cannot be cut.

    Example:
        >>> import torch
        >>> copy = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 3))
        >>> kept = {"weight": {0: torch.tensor([0, 2])}, "bias": {0: torch.tensor([0, 2])}}
        >>> plan = ShrinkPlan(kept, {"weight": (3, 2), "bias": (3,)}, {})
        >>> _ = slice_ema(copy, plan)
        >>> copy(torch.ones(1, 2)).shape
        torch.Size([1, 2])
    """
    if not isinstance(ema, nn.Module):
        raise ArgumentTypeError(f"Expected `ema` to be an nn.Module, got {type(ema).__name__}.")
    names = {name for name, _, _ in all_tensors(ema)}
    inner = None if plan.kept.keys() <= names else ema._modules.get("module")
    return apply_plan(unwrap(ema if inner is None else inner), plan)


def _cut_state(
    state: Mapping[str, Any], old: Tensor, plan: ShrinkPlan, name: str
) -> dict[str, Any]:
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            moved[key] = plan.rescaled(name, plan.cut(name, value), _power(key, state, plan, name))
        elif _is_plain(value):
            moved[key] = value
        else:
            shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ParameterError(
                f"Expected `{key}` in the optimizer's state of `{name}` to be a number or of shape "
                f"{tuple(old.shape)}, got {shown}, which cannot be cut along with the "
                "parameter: build a new optimizer after shrinking."
            )
    return moved


def _power(key: str, state: Mapping[str, Any], plan: ShrinkPlan, name: str) -> int:
    """How state follows a parameter that is multiplied."""
    if name not in plan.factors:
        return 0
    if key not in _POWERS:
        raise ParameterError(
            f"Expected state of `{name}` that is known to follow a rescaled parameter "
            f"({', '.join(_POWERS)}), got `{key}`: make the optimizer anew after shrinking, or "
            "remove whole heads."
        )
    divided = key == "momentum_buffer" and "square_avg" in state  # RMSprop's, of no scale
    return 0 if divided else _POWERS[key]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return value is None or isinstance(value, bool | int | float | str)
