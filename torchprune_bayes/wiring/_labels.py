"""Labels on the entries of activations: which entries of which tensors are removed with them.

In plain words: every index along every dimension of every parameter is an atom, a number. An
activation carries layers of labels; a layer gives for each entry the atom it depends on, and is
stored with size 1 along the dimensions in which it does not vary. Atoms that must be removed
together are recorded as pairs and resolved at the end. Atom 0 stands for entries that are always
kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import TypeAlias

import torch
from torch import Tensor

from torchprune_bayes.wiring._components import components
from torchprune_bayes.wiring.groups import Role

Layer: TypeAlias = Tensor
"""Atoms, int64, of the activation's number of dimensions; size 1 where they do not vary."""


@dataclass(frozen=True)
class State:
    """Tracked state of an activation or a parameter.

    Attributes:
        layers: Its layers of labels.
        weight: Whether it is a parameter, or computed only from parameters and constants.
        pliable: Whether the running code created it to fit, such as zeros, so that its sizes
            follow those of others.
    """

    layers: tuple[Layer, ...] = ()
    weight: bool = False
    pliable: bool = False


@dataclass(frozen=True)
class Cut:
    """A part of a labelled dimension at fixed places.

    Attributes:
        layer: A layer of the tensor that was split; parts of one tensor share it.
        dim: The dimension.
        start: First index of the part.
        stop: One past the last.
        step: Distance between indices.
        module: Qualified name of the module that was running.
    """

    layer: Layer
    dim: int
    start: int
    stop: int
    step: int = 1
    module: str = ""


@dataclass(frozen=True)
class Reshape:
    """A view with sizes given by the code of a module.

    Attributes:
        module: Qualified name of the module that was running.
        labels: The layer afterwards, full size.
        width: Size of the widest dimension over which the labels varied before, or afterwards.
    """

    module: str
    labels: Tensor
    width: int


@dataclass
class Ledger:
    """Everything that is recorded while a model runs.

    Attributes:
        pairs: Atoms that are removed together.
        rectangles: Layers that vary along several dimensions.
        cuts: Parts at fixed places.
        reshapes: Views that split or merge labelled dimensions.
        heads: Atoms that are summed over inside of heads.
        reasons: Atoms that are always kept, and why.
        roles: Atoms of weights, and the role of these for the units.
        numbers: Module, attribute, and the labels of the entries that it counts.
        whole_heads: Whether all dimensions of a head are removed together, or otherwise those of
            all heads, so that the dimensions can be removed separately.
    """

    whole_heads: bool = True
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rectangles: list[Tensor] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    reshapes: list[Reshape] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    reasons: list[tuple[Tensor, str]] = field(default_factory=list)
    roles: list[tuple[Tensor, Role]] = field(default_factory=list)
    numbers: list[tuple[str, str, Tensor]] = field(default_factory=list)

    def note_role(self, labels: Tensor, role: Role) -> None:
        """Record the role of a parameter for the units of these atoms."""
        self.roles.append((labels.reshape(-1), role))

    def note_roles(self, layers: Iterable[Layer], inner: int) -> None:
        """Record that a weight reads along its inner dimension and produces along the others."""
        for layer in layers:
            dims = varying(layer)
            if dims:
                self.note_role(layer, "consumer" if inner in dims else "producer")

    def unite(self, one: Tensor, other: Tensor) -> None:
        """Record that atoms are removed together, entry by entry after broadcasting."""
        one, other = torch.broadcast_tensors(one, other)
        if one.numel() and not torch.equal(one, other):
            self.pairs.append((one.reshape(-1), other.reshape(-1)))

    def fix(self, layer: Layer, reason: str) -> None:
        """Record that atoms are always kept."""
        self.unite(layer, torch.zeros_like(layer))
        self.reasons.append((layer.reshape(-1), reason))

    def join(self, layer: Layer, dims: Iterable[int]) -> Layer:
        """Join all entries along dimensions; return the layer constant along them."""
        for dim in dims:
            first = layer.narrow(dim, 0, 1) if layer.shape[dim] > 1 else layer
            self.unite(layer, first)
            layer = first
        return layer

    def stiffen(self, layer: Layer, dims: Iterable[int], reason: str) -> Layer:
        """Record that dimensions cannot shrink: join labels that also vary elsewhere, fix the rest.

        If dimensions of heads are removed separately, those that must be fixed or joined are fixed.
        """
        for dim in dims:
            if layer.shape[dim] == 1:
                continue
            if layer.shape[dim] == layer.numel() or not self.whole_heads:
                self.fix(layer, reason)
            layer = self.join(layer, [dim])
        return layer

    def keep(self, layers: Iterable[Layer]) -> tuple[Layer, ...]:
        """Return layers without constant ones, recording that activations are rectangular."""
        kept = tuple(layer for layer in layers if layer.numel() > 1)
        self.rectangles += [layer for layer in kept if len(varying(layer)) > 1]
        return kept

    def merge(self, layers: Sequence[Layer]) -> list[Layer]:
        """Unite layers that vary along a common dimension, until none of them do."""
        done: list[Layer] = []
        for layer in layers:
            apart = []
            for other in done:
                if varying(layer) & varying(other):
                    self.unite(layer, other)
                    layer = torch.broadcast_tensors(layer, other)[0]
                else:
                    apart.append(other)
            done = [*apart, layer]
        return done


def varying(layer: Layer) -> set[int]:
    """Dimensions along which labels differ."""
    return {dim for dim, size in enumerate(layer.shape) if size > 1}


def compressed(labels: Tensor) -> Layer:
    """Return labels with size 1 along the dimensions in which they do not differ."""
    if not labels.numel():
        return labels.new_zeros([1] * labels.dim())
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    for dim, size in enumerate(labels.shape):
        first = labels.narrow(dim, 0, 1)
        if size > 1 and bool((labels == first).all()):
            labels = first
    return labels.contiguous()


def aligned(layer: Layer, dims: int) -> Layer:
    """Return a layer with dimensions of size 1 in front, as in broadcasting."""
    return layer.reshape([1] * (dims - layer.dim()) + list(layer.shape))


def solve(ledger: Ledger, atoms: int) -> Tensor:
    """Return the class of each atom, the smallest atom that is removed with it.

    Labels on a rectangle must in the end differ along only one of its dimensions, so that what
    remains is a rectangle again: the one with the most distinct entries. Parts of equal size shrink
    alike; a dimension that is split in another way is kept. If dimensions of heads are removed
    separately neither is required, since queries and values in one tensor are chosen separately; a
    trial decides.
    """
    whole: set[int] = set()
    while True:
        classes = _settled(ledger, atoms, whole)
        uneven = _uneven(ledger.cuts, classes) if ledger.whole_heads else set()
        if uneven <= whole:
            return classes
        whole |= uneven


def _settled(ledger: Ledger, atoms: int, untouched: Collection[int]) -> Tensor:
    """Classes when all layers are straight and even, except for cuts of ``untouched``."""
    pairs = list(ledger.pairs)
    cuts = [cut for cut in ledger.cuts if id(cut.layer) not in untouched]
    while True:
        classes = components(pairs, atoms)
        if not ledger.whole_heads:
            return classes
        more = [pair for layer in ledger.rectangles for pair in _straighten(classes[layer], layer)]
        more += _even(cuts, classes)
        if not more:
            return classes
        pairs += more


def _straighten(classes: Tensor, layer: Layer) -> list[tuple[Tensor, Tensor]]:
    classes = compressed(classes)
    dims = varying(classes)
    if len(dims) < 2:
        return []
    distinct = {dim: len(torch.unique(classes, dim=dim).movedim(dim, 0)) for dim in dims}
    keep = max(dims, key=lambda dim: (distinct[dim], dim))
    first = classes
    for dim in dims - {keep}:
        first = first.narrow(dim, 0, 1)
    return [(classes.reshape(-1), first.expand_as(classes).reshape(-1))]


def _even(cuts: Sequence[Cut], classes: Tensor) -> list[tuple[Tensor, Tensor]]:
    parts: dict[tuple[int, int], list[Cut]] = {}
    for cut in cuts:
        parts.setdefault((id(cut.layer), cut.dim), []).append(cut)
    joined = []
    for (_, dim), group in parts.items():
        rows = classes[group[0].layer].movedim(dim, -1)
        size = rows.shape[-1]
        if bool((rows == rows[..., :1]).all()):
            continue
        # Parts that are unions of others shrink as these do.
        width = gcd(size, *(cut.stop - cut.start for cut in group))
        regular = all(cut.step == 1 and cut.start % width == 0 for cut in group)
        if regular and width in {cut.stop - cut.start for cut in group}:
            rows = rows.reshape(*rows.shape[:-1], size // width, width)
            other = rows[..., :1, :]
        else:
            other = torch.zeros_like(rows) if rows.numel() == size else rows[..., :1]
        other = other.expand_as(rows)
        if not torch.equal(rows, other):
            joined.append((rows.reshape(-1), other.reshape(-1)))
    return joined


def _uneven(cuts: Sequence[Cut], classes: Tensor) -> set[int]:
    """One-dimensional layers with parts of several sizes, which would otherwise be kept whole.

    A trial shows whether the code reads the sizes of the parts from attributes that can change.
    """
    parts: dict[int, list[Cut]] = {}
    for cut in cuts:
        parts.setdefault(id(cut.layer), []).append(cut)
    keys = set()
    for key, group in parts.items():
        layer = group[0].layer
        spans = sorted({(part.start, part.stop) for part in group})
        ends = [0, *(stop for _, stop in spans)]
        side_by_side = ends[:-1] == [start for start, _ in spans] and ends[-1] == layer.numel()
        labels = classes[layer].reshape(-1)
        sizes = {stop - start for start, stop in spans}
        if side_by_side and len(sizes) > 1 and bool((labels == labels[0]).all()):
            keys.add(key)
    return keys
