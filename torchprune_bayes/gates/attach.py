"""Putting gates into a model without editing its source, and finding them again.

In plain words: a gate is a submodule of the layer it sits on, so that it moves, saves, copies and
trains with the model, and a hook of that layer calls it. The hooks are plain functions that look
the gate up, so that copies and pickles of a model use their own gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.gates.collection import Gates
from torchprune_bayes.gates.noise_gate import NoiseGate
from torchprune_bayes.gates.scaling import scale_units
from torchprune_bayes.gates.site import Site, activation_dim, entries_of
from torchprune_bayes.gates.sites import check_site, find_sites
from torchprune_bayes.params import unwrap
from torchprune_bayes.wiring.forward import ForwardFunction

GATE_NAMES = {"out": "noise_gate_out", "in": "noise_gate_in"}


def attach_gates(
    model: nn.Module,
    sites: str | Sequence[str | Site] = "auto",
    example_inputs: Any = None,
    *,
    preserve: bool = False,
    heads: bool = True,
    residual: bool = False,
    forward_fn: ForwardFunction | None = None,
    **options: Any,
) -> Gates:
    """Put a :class:`NoiseGate` on each site. Do it before the optimizer and DDP are made.

    Args:
        model: Any module; wrappers are looked through.
        sites: The name of a preset, see :func:`~torchprune_bayes.gates.find_sites`; or a list of
            sites, and of patterns of module names whose outputs are to be gated.
        example_inputs: What the model is called with, for ``"auto"`` to trace how its units are
            wired; needed for models that match no preset and are not chains.
        preserve: Divide the weights beside the gates by the first E[θ], so that the output in
            evaluation mode is unchanged; for pretrained models.
        heads: Whether a preset gates attention heads.
        residual: Whether the ResNet preset gates what writes to residual streams.
        forward_fn: ``forward_fn(model, example_inputs) -> output`` for other ways to call it.
        options: Further arguments of :class:`NoiseGate`, such as ``noise="batch"``.

    Returns:
        The gates by site.

    Raises:
        ArgumentError: If sites match nothing, do not fit, or have gates already.
        ParameterError: If a weight beside a gate is shared.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
        >>> gates = attach_gates(model, noise="batch")
        >>> gates, gates["0"]
        (Gates(0: 4 channel), NoiseGate(4, repeat=1, dim=1, noise='batch'))
    """
    model = unwrap(model)
    if isinstance(sites, str):
        chosen = find_sites(
            model, sites, example_inputs, heads=heads, residual=residual, forward_fn=forward_fn
        )
    else:
        chosen = _resolve(model, sites)
    modules = [check_site(model, site) for site in chosen]
    _refuse_repeats(chosen, modules)
    gates = {
        site.name: NoiseGate(site.units, repeat=site.repeat, dim=activation_dim(module), **options)
        for site, module in zip(chosen, modules, strict=True)
    }
    for site, module in zip(chosen, modules, strict=True):
        gate = gates[site.name].to(next(module.parameters()).device)
        gate.train(module.training)
        if preserve:
            scale_units(module, site.side, 1 / gate.scale().detach())
        _install(module, site, gate)
    return Gates(model, gates, {site.name: site for site in chosen})


def gates_of(model: nn.Module) -> Gates:
    """Find the gates in a model, which may be a copied or unpickled one.

    Raises:
        ArgumentError: If there are none.
    """
    model = unwrap(model)
    gates: dict[str, NoiseGate] = {}
    sites: dict[str, Site] = {}
    for module_name, module in model.named_modules():
        for name in GATE_NAMES.values():
            gate = module._modules.get(name)
            if isinstance(gate, NoiseGate):
                site = _renamed(getattr(module, f"_{name}_site"), module_name)
                gates[site.name], sites[site.name] = gate, site
    if not gates:
        raise ArgumentError(
            f"Expected a model with gates, got none in {type(model).__name__}: "
            "attach_gates(model) inserts them."
        )
    return Gates(model, gates, sites)


def detach_gate(module: nn.Module, name: str) -> None:
    """Remove a gate and its hook."""
    delattr(module, name)
    delattr(module, f"_{name}_site")
    for hooks, function in (
        (module._forward_hooks, _gate_output),
        (module._forward_pre_hooks, _gate_input),
    ):
        if name == GATE_NAMES["out" if function is _gate_output else "in"]:
            for key in [key for key, hook in hooks.items() if hook is function]:
                del hooks[key]


def _renamed(site: Site, name: str) -> Site:
    # In a part of a gated model, or a model around it, the modules have other names.
    return site if site.module == name else replace(site, module=name, producer=None)


def _install(module: nn.Module, site: Site, gate: NoiseGate) -> None:
    name = GATE_NAMES[site.side]
    module.add_module(name, gate)
    setattr(module, f"_{name}_site", site)
    if site.side == "out":
        module.register_forward_hook(_gate_output)
    else:
        module.register_forward_pre_hook(_gate_input)


def _gate_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.noise_gate_out(output)  # type: ignore[operator]


def _gate_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.noise_gate_in(inputs[0]), *inputs[1:])  # type: ignore[operator]


def _resolve(model: nn.Module, sites: Sequence[str | Site]) -> list[Site]:
    chosen: list[Site] = []
    for item in sites:
        if isinstance(item, Site):
            chosen.append(item)
        elif isinstance(item, str):
            chosen += _matching(model, item)
        else:
            raise ArgumentTypeError(f"Expected sites or patterns of names, got {item!r}.")
    if not chosen:
        raise ArgumentError("Expected at least one site, got none.")
    return chosen


def _matching(model: nn.Module, pattern: str) -> list[Site]:
    matching = [
        Site(name, "out", units, kind="hidden" if activation_dim(module) == -1 else "channel")
        for name, module in model.named_modules()
        if fnmatchcase(name, pattern) and (units := entries_of(module, "out"))
    ]
    if not matching:
        raise ArgumentError(
            f"Expected layers or batch norms whose names match {pattern!r}, got none."
        )
    return matching


def _refuse_repeats(sites: Sequence[Site], modules: Sequence[nn.Module]) -> None:
    names = [site.name for site in sites]
    repeated = {name for name in names if names.count(name) > 1}
    occupied = {
        site.name
        for site, module in zip(sites, modules, strict=True)
        if GATE_NAMES[site.side] in module._modules
    }
    if repeated | occupied:
        raise ArgumentError(
            f"Expected one gate at a site, got several at {', '.join(sorted(repeated | occupied))}."
        )
