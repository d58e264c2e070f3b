"""Where gates can sit in a model, and how a gate there is folded into the weights.

In plain words: behind a layer a gate scales the rows that produce a unit (``side="out"``), in front
of a layer the columns that read it (``side="in"``). The second does not depend on the activation in
between, so it is how hidden units and attention heads are gated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.gates._blocks import BLOCKS, resnet_sites, transformer_sites
from torchprune_bayes.gates._chains import chain_sites
from torchprune_bayes.gates._silence import silenced
from torchprune_bayes.gates.site import Site, entries_of
from torchprune_bayes.layer_kinds import Side
from torchprune_bayes.wiring.forward import ForwardFunction
from torchprune_bayes.wiring.groups import UnitGroup, UnitSlice
from torchprune_bayes.wiring.trace import observe
from torchprune_bayes.wiring.units import groups_of


def find_sites(
    model: nn.Module,
    preset: str = "auto",
    example_inputs: Any = None,
    *,
    heads: bool = True,
    residual: bool = False,
    forward_fn: ForwardFunction | None = None,
) -> list[Site]:
    """List the places for gates in a model.

    Known blocks are recognised by class name and attributes: the hidden units and heads of ViT
    (timm and Hugging Face), BERT, DistilBERT and GPT-2, and the channels of ResNet (torchvision
    and timm). Any other model is run on example inputs, if given, and each group of units
    that shrinking finds and that one batch norm or one layer reads gets a gate there, on a batch
    norm only if what it makes zero reaches the layers behind it as zero.
    Without them it must be a chain, such as an MLP, LeNet or VGG: its code is followed
    symbolically, and each value must be read by one layer, in the order in which they were
    registered. The last layer gets no gate.

    Args:
        model: Any module.
        preset: ``"auto"``, or one of ``"chain"``, ``"resnet"``, ``"timm-vit"``, ``"hf-vit"``,
            ``"bert"``, ``"distilbert"``, ``"gpt2"``.
        example_inputs: What the model is called with: a tensor, a tuple of positional or a mapping
            of keyword arguments.
        heads: Whether attention heads get gates.
        residual: Whether the batch norms that write to a residual stream of a ResNet get gates, as
            in arXiv:2406.01345. A channel of the stream is removed only where all of them are
            closed.
        forward_fn: ``forward_fn(model, example_inputs) -> output`` for other ways to call it.

    Returns:
        The sites, in the order of the model's modules.

    Raises:
        ArgumentError: If the preset is unknown or matches nothing, or the model is not a chain and
            no example inputs are given.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> find_sites(model)
        [Site(module='2', side='in', units=3, repeat=1, kind='hidden', producer='0')]
    """
    finders: dict[str, Callable[[], Iterator[Site]]] = {
        rule.preset: partial(transformer_sites, model, rule.preset, heads) for rule in BLOCKS
    }
    finders["resnet"] = partial(resnet_sites, model, residual)
    finders["chain"] = partial(chain_sites, model)
    if preset != "auto" and preset not in finders:
        raise ArgumentError(f"Expected one of auto, {', '.join(finders)}, got {preset!r}.")
    if preset == "auto" and example_inputs is not None:
        finders["chain"] = partial(_wired, model, example_inputs, forward_fn, heads)
    for name in finders if preset == "auto" else [preset]:
        sites = list(finders[name]())
        if sites:
            return sites
    why = (
        "; none of its units are all read by one layer that is called, or scaled by one batch norm"
        if preset == "auto" and example_inputs is not None
        else ""
    )
    raise ArgumentError(
        f"Expected a model with sites of preset {preset!r}, got none in "
        f"{type(model).__name__}{why}."
    )


def _wired(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFunction | None, heads: bool
) -> Iterator[Site]:
    """Yield a site for each group of units that one batch norm scales or one layer reads."""
    wiring = observe(model, example_inputs, forward_fn)
    result = [
        (site, group)
        for group in groups_of(model, wiring)
        if heads or group.kind != "head"
        for site in _site_of(model, group, wiring.called)
    ]
    norms = [(site.module, group) for site, group in result if site.side == "out"]
    silent = silenced(model, norms, example_inputs, forward_fn) if norms else set()
    yield from (site for site, _ in result if site.side == "in" or site.module in silent)


def _site_of(model: nn.Module, group: UnitGroup, called: Collection[str]) -> Iterator[Site]:
    """Yield a site on a layer that is called, and whose hooks therefore run."""
    weights = [piece for piece in group.slices if not piece.name.endswith("bias")]
    makers = [piece for piece in weights if piece.role == "producer"]
    norms = [piece for piece in weights if piece.role == "norm" and piece.name.endswith("weight")]
    readers = [piece for piece in weights if piece.role == "consumer"]
    places: list[tuple[list[UnitSlice], Side]] = [(readers, "in")]
    if len(norms) == len(makers) == 1:
        places.append((norms, "out"))
    for candidates, side in places:
        if len(candidates) == 1 and _fits(model, group, candidates[0], side):
            site = _site(model, group, candidates[0], side, makers)
            if site.module in called:
                yield site
                return


def _site(
    model: nn.Module, group: UnitGroup, piece: UnitSlice, side: Side, makers: list[UnitSlice]
) -> Site:
    """The producer is named if it is one layer whose outputs are laid out like the gate."""
    repeat = piece.positions.shape[1]
    matches = len(makers) == 1 and makers[0].positions.shape[1] == repeat
    matches = matches and _fits(model, group, makers[0], "out")
    producer = makers[0].name.rpartition(".")[0] if matches else None
    return Site(piece.name.rpartition(".")[0], side, group.units, repeat, group.kind, producer)


def _fits(model: nn.Module, group: UnitGroup, piece: UnitSlice, side: Side) -> bool:
    """Whether the units are contiguous and fill a side of a layer that can hold a gate."""
    name, _, key = piece.name.rpartition(".")
    entries = piece.positions.numel()
    in_order = torch.equal(piece.positions.reshape(-1), torch.arange(entries))
    return in_order and key == "weight" and entries_of(model.get_submodule(name), side) == entries


def check_site(model: nn.Module, site: Site) -> nn.Module:
    """Return the module of a site.

    Raises:
        ArgumentError: If it is not in the model or the gate does not fit.
        ParameterError: If its weight is shared, so that a gate could not be folded into it.
    """
    modules = dict(model.named_modules())
    if site.module not in modules:
        raise ArgumentError(f"Expected a site in the model, got {site.module!r}.")
    module = modules[site.module]
    entries = entries_of(module, site.side)
    if entries != site.units * site.repeat:
        raise ArgumentError(
            f"Expected a gate of {entries or 'no'} entries at `{site.name}`, a "
            f"{type(module).__name__}, got {site.units} x {site.repeat}."
        )
    places = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is getattr(module, "weight", None)
    ]
    if len(places) > 1:
        raise ParameterError(
            f"Expected a weight of its own at `{site.name}`, got one shared by {', '.join(places)}."
        )
    return module
