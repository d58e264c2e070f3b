"""Where gates can sit in a model, and how a gate there is folded into the weights.

In plain words: behind a layer a gate scales the rows that produce a unit (``side="out"``), in front
of a layer the columns that read it (``side="in"``). The second does not depend on the activation in
between, so it is how hidden units and attention heads are gated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.gates._chains import check_chain
from torchprune_bayes.gates._silence import silenced
from torchprune_bayes.layer_kinds import Side, kind_of
from torchprune_bayes.wiring.forward import ForwardFunction
from torchprune_bayes.wiring.groups import UnitGroup, UnitSlice
from torchprune_bayes.wiring.trace import observe
from torchprune_bayes.wiring.units import groups_of


@dataclass(frozen=True)
class Site:
    """A place for a gate.

    Attributes:
        module: Qualified name of the layer or batch norm that holds the gate.
        side: Whether the gate scales its output or its input.
        units: Number of gates.
        repeat: Neighbouring entries that share one.
        kind: ``"hidden"``, ``"channel"`` or ``"head"``.
        producer: Qualified name of the layer whose weights produce the units, if known.
    """

    module: str
    side: Side
    units: int
    repeat: int = 1
    kind: str = "hidden"
    producer: str | None = None

    @property
    def name(self) -> str:
        """The module's name, with ``":in"`` where the gate scales its input."""
        return self.module if self.side == "out" else f"{self.module}:in"


@dataclass(frozen=True)
class BlockRule:
    """Where a transformer block has its heads and hidden units, relative to the block."""

    preset: str
    block: str
    attention: str
    heads: str
    producer: str
    consumer: str


BLOCKS = (
    BlockRule("timm-vit", "Block", "attn.proj", "attn.num_heads", "mlp.fc1", "mlp.fc2"),
    BlockRule(
        "hf-vit",
        "ViTLayer",
        "attention.o_proj",
        "attention.num_attention_heads",
        "mlp.fc1",
        "mlp.fc2",
    ),
    BlockRule(  # as it was named before transformers 5
        "hf-vit",
        "ViTLayer",
        "attention.output.dense",
        "attention.attention.num_attention_heads",
        "intermediate.dense",
        "output.dense",
    ),
    BlockRule(
        "bert",
        "BertLayer",
        "attention.output.dense",
        "attention.self.num_attention_heads",
        "intermediate.dense",
        "output.dense",
    ),
    BlockRule(
        "distilbert",
        "TransformerBlock",
        "attention.out_lin",
        "attention.n_heads",
        "ffn.lin1",
        "ffn.lin2",
    ),
    BlockRule("gpt2", "GPT2Block", "attn.c_proj", "attn.num_heads", "mlp.c_fc", "mlp.c_proj"),
)

RESNET_BLOCKS = ("BasicBlock", "Bottleneck")


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
        rule.preset: lambda preset=rule.preset: _transformer(model, preset, heads)  # type: ignore[misc]
        for rule in BLOCKS
    }
    finders |= {"resnet": lambda: _resnet(model, residual), "chain": lambda: _chain(model)}
    if preset != "auto" and preset not in finders:
        raise ArgumentError(f"Expected one of auto, {', '.join(finders)}, got {preset!r}.")
    if preset == "auto" and example_inputs is not None:
        finders["chain"] = lambda: _wired(model, example_inputs, forward_fn, heads)
    for name in finders if preset == "auto" else [preset]:
        sites = list(finders[name]())
        if sites:
            if name == "chain" and example_inputs is None:
                check_chain(model)
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


def entries_of(module: nn.Module, side: Side) -> int | None:
    """How many entries a gate on a module has; ``None`` where no gate fits.

    A gate fits where it can be folded: behind linear layers, convolutions and affine batch norms,
    and in front of linear layers and convolutions without groups.
    """
    return kind_of(module).gate_entries(module, side)


def weight_dim(module: nn.Module, side: Side) -> int:
    """Dimension of ``module.weight`` that a gate on this side scales."""
    return kind_of(module).weight_dim(side)


def activation_dim(module: nn.Module) -> int:
    """Dimension of a module's activations that holds the units."""
    return kind_of(module).units_dim


def _transformer(model: nn.Module, preset: str, heads: bool) -> Iterator[Site]:
    for name, block in model.named_modules():
        for rule in BLOCKS:
            if rule.preset != preset or type(block).__name__ != rule.block:
                continue
            at = f"{name}." if name else ""
            attention, consumer = _lookup(block, rule.attention), _lookup(block, rule.consumer)
            count = _lookup(block, rule.heads)
            if heads and isinstance(attention, nn.Module) and isinstance(count, int):
                entries = entries_of(attention, "in")
                if entries:
                    yield Site(at + rule.attention, "in", count, entries // count, "head")
            if isinstance(consumer, nn.Module) and (entries := entries_of(consumer, "in")):
                yield Site(at + rule.consumer, "in", entries, producer=at + rule.producer)


def _resnet(model: nn.Module, residual: bool) -> Iterator[Site]:
    seen = False
    modules = dict(model.named_modules())
    for name, block in modules.items():
        if type(block).__name__ not in RESNET_BLOCKS or not hasattr(block, "conv2"):
            continue
        if residual and not seen:
            yield from _batch_norms(modules, [("bn1", "conv1")])
        seen = True
        last = 3 if hasattr(block, "conv3") else 2
        inner = range(1, last + 1 if residual else last)
        places = [(f"{name}.bn{i}", f"{name}.conv{i}") for i in inner]
        if residual:
            places += [
                (key, "")
                for key in modules
                if key.startswith((f"{name}.downsample.", f"{name}.shortcut."))
            ]
        yield from _batch_norms(modules, places)


def _batch_norms(modules: dict[str, nn.Module], places: list[tuple[str, str]]) -> Iterator[Site]:
    for name, producer in places:
        module = modules.get(name)
        if module is None or not kind_of(module).is_norm:
            continue
        if entries := entries_of(module, "out"):
            yield Site(name, "out", entries, kind="channel", producer=producer or None)


def _chain(model: nn.Module) -> Iterator[Site]:
    layers = list(_layers(model))
    weighty = [i for i, (_, layer) in enumerate(layers) if not kind_of(layer).is_norm]
    for index, following in pairwise(weighty):
        name, layer = layers[index]
        norm_name, norm = layers[index + 1]
        next_name, successor = layers[following]
        units = entries_of(layer, "out")
        assert units is not None
        kind = "hidden" if activation_dim(layer) == -1 else "channel"
        if kind_of(norm).is_norm:
            # Norms over units mix them, so that none can be gated or removed on its own.
            if entries_of(norm, "out") == units:
                yield Site(norm_name, "out", units, kind=kind, producer=name)
        elif kind == "channel":
            yield Site(name, "out", units, kind=kind, producer=name)
        elif activation_dim(successor) == -1 and units == entries_of(successor, "in"):
            yield Site(next_name, "in", units, producer=name)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    attention = [name for name, m in model.named_modules() if "Attention" in type(m).__name__]
    for name, module in model.named_modules():
        gateable = kind_of(module).is_norm or entries_of(module, "out") is not None
        if gateable and not any(f"{name}.".startswith(f"{outer}.") for outer in attention):
            yield name, module


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


def _lookup(module: object, path: str) -> object:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


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
