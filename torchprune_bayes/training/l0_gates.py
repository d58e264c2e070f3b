"""Hard-concrete gates on the units of a model, and removing those that have closed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates.scaling import scale_units
from torchprune_bayes.gates.site import Site, activation_dim
from torchprune_bayes.gates.sites import check_site, find_sites
from torchprune_bayes.params import unwrap
from torchprune_bayes.training.hard_concrete import HardConcreteGate

_NAMES = {"out": "l0_gate_out", "in": "l0_gate_in"}


def attach_l0_gates(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    sites: str = "auto",
    **options: Any,
) -> list[HardConcreteGate]:
    """Put a hard-concrete gate on each unit of a model, in place; before its optimizer is made.

    The units are those of :func:`~torchprune_bayes.gates.find_sites`. Each gate represents the
    weights that produce its unit, which :func:`~torchprune_bayes.training.expected_l0` counts; add
    it to the loss, times a factor, and call ``gate.constrain()`` after each update.

    Args:
        model: Any module; wrappers are looked through.
        example_inputs: What the model is called with, where it is neither a chain nor of a preset.
        sites: See :func:`~torchprune_bayes.gates.find_sites`.
        options: Further arguments of :class:`~torchprune_bayes.training.HardConcreteGate`.

    Returns:
        The gates.

    Raises:
        ArgumentError: If there is no place for gates, or the model has some already.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [gate] = attach_l0_gates(model)
        >>> gate.weights_per_unit
        4.0
    """
    model = unwrap(model)
    if _placed(model):
        raise ArgumentError("Expected a model without hard-concrete gates, got one that has some.")
    places = find_sites(model, sites, example_inputs)
    modules = [check_site(model, site) for site in places]
    gates = []
    for site, module in zip(places, modules, strict=True):
        gate = HardConcreteGate(
            site.units,
            **{"weights_per_unit": _weights(model, site, module), **options},
            dim=activation_dim(module),
            repeat=site.repeat,
        ).to(next(module.parameters()).device)
        gate.train(module.training)
        module.add_module(_NAMES[site.side], gate)
        if site.side == "out":
            module.register_forward_hook(_after)
        else:
            module.register_forward_pre_hook(_before)
        gates.append(gate)
    return gates


@torch.no_grad()
def fold_l0_gates(model: nn.Module) -> int:
    """Scale the weights by the gates of evaluation mode, zero for closed ones, and remove all.

    The output in evaluation mode is unchanged up to rounding. Closed units are removed by
    ``shrink(model, inputs, LargestWeightImportance("any", 1e-12), target="evidence")``.

    Returns:
        How many units are closed.

    Raises:
        ArgumentError: If there are no such gates.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [gate] = attach_l0_gates(model)
        >>> with torch.no_grad():
        ...     _ = gate.log_alpha.copy_(torch.tensor([-9.0, 0.0, 9.0]))
        >>> fold_l0_gates(model)
        1
        >>> (model[2].weight == 0).sum(0)
        tensor([2, 0, 0])
    """
    placed, closed = _placed(unwrap(model)), 0
    if not placed:
        raise ArgumentError(
            "Expected a model with hard-concrete gates, got one without: "
            "attach_l0_gates(model) inserts them."
        )
    for module, side, gate in placed:
        scale = gate.expected_gate()
        closed += int((scale == 0).sum())
        scale_units(module, side, scale.repeat_interleave(gate.repeat))  # type: ignore[arg-type]
        delattr(module, _NAMES[side])
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_after, _before)]:
                del hooks[key]
    return closed


def _placed(model: nn.Module) -> list[tuple[nn.Module, str, HardConcreteGate]]:
    return [
        (module, side, gate)
        for module in model.modules()
        for side, name in _NAMES.items()
        if isinstance(gate := module._modules.get(name), HardConcreteGate)
    ]


def _weights(model: nn.Module, site: Site, module: nn.Module) -> float:
    """Weights per unit of the layer that produces it; of the gated layer, where that is unknown."""
    maker = module if site.producer is None else model.get_submodule(site.producer)
    weight = maker.weight
    assert isinstance(weight, Tensor)
    return max(weight.numel() / site.units, 1.0)


def _after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.l0_gate_out(output)  # type: ignore[operator]


def _before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.l0_gate_in(inputs[0]), *inputs[1:])  # type: ignore[operator]
