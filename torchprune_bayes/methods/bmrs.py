"""Bayesian model reduction for structured pruning, as a method of PyTorch (arXiv:2406.01345)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.prune import BasePruningMethod

from torchprune_bayes._checks import check_amount
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.gates import (
    Criterion,
    Gates,
    NoiseGate,
    choose_closed,
    find_criterion,
    gates_of,
)
from torchprune_bayes.gates.attach import GATE_NAMES
from torchprune_bayes.gates.scaling import unit_norms
from torchprune_bayes.gates.site import weight_dim
from torchprune_bayes.layer_kinds import Side
from torchprune_bayes.methods.module_state import all_or_nothing, same_order
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import leaf


@register(
    "bmrs",
    title="units whose removal raises the evidence",
    paper="arXiv:2406.01345",
    needs_calibration=False,
)
class BMRS(BasePruningMethod):
    """Mask whole units where the evidence of a model without them is higher.

    Per unit this is the change of the log evidence when the prior of its noise gate is shrunk
    to zero after training (Wright, Igel and Selvan 2024, arXiv:2406.01345, equations 5 to 8). No
    amount needs to be given.

    Args:
        amount: ``None`` prunes what the criterion says; a fraction or number of the remaining units
            is a cap on it.
        gate: The trained gate of these units; ``None`` takes the one that sits on the module.
        criterion: ``"bmrs-n"``, ``"bmrs-u8"`` (any p1), ``"snr"`` or ``"mean"``, or a
            :class:`~torchprune_bayes.gates.Criterion`.
        dim: Dimension of the tensor that holds the units; ``None`` for the one that the gate
            scales, and for rows where the gate sits elsewhere.
        beyond: Prune ``amount`` even where the criterion says no.

    Raises:
        ArgumentError: If an argument has an impossible value.
        ArgumentTypeError: If there is no gate.

    Cost: a few evaluations of log Φ for each unit.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> layer = nn.Conv2d(1, 3, 1)
        >>> gate = attach_gates(layer, ["*"])[""]
        >>> with torch.no_grad():  # the second channel has collapsed
        ...     _ = gate.mu.copy_(torch.tensor([0.0, -19.0, 0.0]))
        ...     _ = gate.log_sigma.copy_(torch.tensor([-5.0, 1.0, -5.0]))
        >>> _ = BMRS.apply(layer, "weight")
        >>> layer.weight_mask.flatten(), layer.bias_mask
        (tensor([1., 0., 1.]), tensor([1., 0., 1.]))
    """

    PRUNING_TYPE = "structured"
    needs_calibration = False

    def __init__(
        self,
        amount: float | int | None = None,
        *,
        gate: NoiseGate | None = None,
        criterion: Criterion | str = "bmrs-n",
        dim: int | None = None,
        beyond: bool = False,
    ) -> None:
        if amount is not None:
            check_amount(amount)
        elif beyond:
            raise ArgumentError("Expected an `amount` with beyond=True, got none.")
        self.amount = amount
        self.criterion = find_criterion(criterion)
        self.beyond = beyond
        self.dim = 0 if dim is None else dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """PyTorch's pruning API: mask the remaining units whose margin says so.

        Args:
            t: Margins, the same for all entries of a unit, of the units that remain.
            default_mask: Shaped like ``t``, zero where an entry is pruned already.

        Returns:
            The mask, shaped and typed like ``default_mask``.
        """
        others = [axis for axis in range(t.ndim) if axis != self.dim % t.ndim]
        margins = t.amax(dim=others) if others else t
        remaining = (default_mask != 0).sum(dim=others) > 0 if others else default_mask != 0
        units = {"": remaining}
        pruned = choose_closed({"": margins}, units, amount=self.amount, beyond=self.beyond)[""]
        mask = default_mask.clone()
        return mask.index_fill_(self.dim, pruned.nonzero().flatten(), 0)

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        *args: Any,
        importance_scores: Tensor | None = None,
        **kwargs: Any,
    ) -> BasePruningMethod:
        """Prune the units of one tensor, and of the bias of the same layer along.

        Args:
            module: Layer that makes or reads the units.
            name: Name of the tensor in it.
            args: Arguments of the method.
            importance_scores: Must be ``None``: the gate gives them.
            kwargs: Arguments of the method.

        Returns:
            The hook: the method, or a container of it and of those applied before.

        Raises:
            ArgumentError: If importance scores are passed or the gate has other units.
            ArgumentTypeError: If there is no gate.
        """
        if importance_scores is not None:
            raise ArgumentError(f"Expected no importance_scores: {cls.__name__} computes its own.")
        gate, side = _gate_for(module, kwargs.get("gate"))
        if kwargs.get("dim") is None:
            kwargs["dim"] = weight_dim(module, side) if name == "weight" else 0
        method = cls(*args, **kwargs)
        scores = method._scores(module, name, gate, side)
        with all_or_nothing([(module, name), (module, "bias")], values=False), same_order(module):
            # PyTorch builds the method by calling its first argument; handing a made one over
            # does not store the gate on the module.
            hook = BasePruningMethod.apply.__func__(  # type: ignore[attr-defined]
                lambda: method, module, name, importance_scores=scores
            )
            if method.dim == weight_dim(module, "out") and leaf(module, "bias") is not None:
                kept = _remaining_units(getattr(module, f"{name}_mask"), method.dim)
                prune.custom_from_mask(module, "bias", kept.to(module.bias))  # type: ignore[arg-type]
        return hook

    def _scores(self, module: nn.Module, name: str, gate: NoiseGate, side: Side) -> Tensor:
        tensor = leaf(module, name)
        if tensor is None or tensor.shape[self.dim] != gate.units * gate.repeat:
            got = "none" if tensor is None else f"{tensor.shape[self.dim]}"
            raise ArgumentError(
                f"Expected {gate.units * gate.repeat} entries along dimension {self.dim} of "
                f"`{name}`, got {got}."
            )
        if gate.repeat != 1:
            raise ArgumentError(
                f"Expected a gate for each entry of `{name}`, got one for {gate.repeat}: use "
                "prune_gated, which keeps them together."
            )
        margins = self._margins(module, gate, side)
        sizes = [1] * tensor.ndim
        sizes[self.dim] = -1
        return margins.to(tensor.device).view(sizes).expand(tensor.shape)

    @torch.no_grad()
    def _margins(self, module: nn.Module, gate: NoiseGate, side: Side) -> Tensor:
        margins = self.criterion.margin(
            gate.posterior, lambda: unit_norms(module, side, gate.repeat)
        )
        return margins.masked_fill(~gate.mask, torch.inf)


def prune_gated(
    model: nn.Module,
    criterion: Criterion | str = "bmrs-n",
    *,
    amount: float | int | None = None,
    beyond: bool = False,
    keep: int = 1,
) -> dict[str, Tensor]:
    """Close gates and mask everything their units own, biases and norms included.

    Masked are the weights that a gate scales, and those of the layer that makes the units where
    the site knows it, as ``torch.nn.utils.prune`` does: ``<name>_orig``, ``<name>_mask`` and a
    hook. Masking only weights would leave the contributions of biases and batch norms behind them.

    Args:
        model: A model with gates.
        criterion: A criterion or its name.
        amount: ``None`` closes what the criterion says; a fraction or number of the open gates is
            a cap on it.
        beyond: Close ``amount`` even where the criterion says no.
        keep: Units to keep at each site.

    Returns:
        The masks of the units by site, ``True`` where a unit is kept.

    Raises:
        ArgumentError: If there are no gates or an argument has an impossible value.

    Cost: a few evaluations of log Φ for each gate, and one pass over the gated weights.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> gates = attach_gates(model)
        >>> with torch.no_grad():  # the second hidden unit has collapsed
        ...     _ = gates["2:in"].mu.copy_(torch.tensor([0.0, -19.0, 0.0]))
        ...     _ = gates["2:in"].log_sigma.copy_(torch.tensor([-5.0, 1.0, -5.0]))
        >>> prune_gated(model)
        {'2:in': tensor([ True, False,  True])}
        >>> model[2].weight_mask, model[0].bias_mask
        (tensor([[1., 0., 1.]]), tensor([1., 0., 1.]))
    """
    gates = gates_of(model)
    gates.prune(criterion, amount=amount, beyond=beyond, keep=keep)
    owned = list(_owned(gates))
    with ExitStack() as stack:
        stack.enter_context(all_or_nothing([(m, n) for m, n, _, _ in owned], values=False))
        for module in {id(module): module for module, *_ in owned}.values():
            stack.enter_context(same_order(module))
        for module, name, dim, remaining in owned:
            _mask_units(module, name, dim, remaining)
    return {name: mask.clone() for name, mask in gates.masks.items()}


def _owned(gates: Gates) -> Iterator[tuple[nn.Module, str, int, Tensor]]:
    for name, site in gates.sites.items():
        remaining = gates[name].mask.repeat_interleave(site.repeat)
        places: list[tuple[str, Side]] = [(site.module, site.side)]
        if site.producer not in (None, site.module):
            assert site.producer is not None
            places.append((site.producer, "out"))
        for module_name, side in places:
            module = gates.model.get_submodule(module_name)
            weight = leaf(module, "weight")
            assert weight is not None
            yield module, "weight", weight_dim(module, side) if weight.ndim > 1 else 0, remaining
            if side == "out" and leaf(module, "bias") is not None:
                yield module, "bias", 0, remaining


def _mask_units(module: nn.Module, name: str, dim: int, remaining: Tensor) -> None:
    tensor, known = leaf(module, name), getattr(module, f"{name}_mask", None)
    assert tensor is not None
    sizes = [1] * tensor.ndim
    sizes[dim] = -1
    mask = remaining.to(tensor).view(sizes).expand(tensor.shape).contiguous()
    if bool((mask if known is None else mask - known).min() < (1 if known is None else 0)):
        prune.custom_from_mask(module, name, mask)


def _remaining_units(mask: Tensor, dim: int) -> Tensor:
    others = [axis for axis in range(mask.ndim) if axis != dim]
    return mask.sum(dim=others) > 0


def _gate_for(module: nn.Module, gate: NoiseGate | None) -> tuple[NoiseGate, Side]:
    sides: tuple[Side, Side] = ("out", "in")
    for side in sides:
        noise_gate = module._modules.get(GATE_NAMES[side])
        if isinstance(noise_gate, NoiseGate) and gate in (None, noise_gate):
            return noise_gate, side
    if not isinstance(gate, NoiseGate):
        raise ArgumentTypeError(
            f"Expected `gate=` or a gate on the {type(module).__name__}, got {gate!r}."
        )
    return gate, "out"
