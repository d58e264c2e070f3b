"""Layers that the run did not reach, and what they may read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from torchprune_bayes.wiring.groups import UnitGroup


def read_unseen(
    model: nn.Module, groups: Sequence[UnitGroup], used: Collection[str]
) -> dict[str, str]:
    """Find groups that a layer that did not run may read, judged by its number of inputs.

    A branch that did not run is entered through its first layer, and through layers whose inputs no
    other layer of the branch produces.

    Args:
        model: The model.
        groups: Its groups.
        used: Names of the parameters that ran.

    Returns:
        A sentence for each such group.
    """
    entries = {
        size: name
        for root in unreached(model, used)
        for name, size in _entries(model.get_submodule(root), root)
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    reasons = {}
    for group in groups:
        sizes = {tensors[piece.name].shape[piece.dim] for piece in group.slices}
        met = sorted(sizes & entries.keys())
        if met:
            reasons[group.name] = (
                f"`{entries[met[0]]}`, which the example inputs do not reach, may read its "
                f"{met[0]} entries"
            )
    return reasons


def unreached(model: nn.Module, used: Collection[str]) -> Iterator[str]:
    """Yield the outermost modules without any read parameter, next to others with some.

    A parameter that is tied to a read one counts as read.
    """
    first = dict(model.named_parameters())
    read = {id(first[name]) for name in used if name in first}
    reached = {""}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        while name and id(parameter) in read:
            name = name.rpartition(".")[0]
            reached.add(name)
    for name, module in model.named_modules():
        has_parameters = any(True for _ in module.parameters())
        if has_parameters and name not in reached and name.rpartition(".")[0] in reached:
            yield name


def _entries(branch: nn.Module, root: str) -> Iterator[tuple[str, int]]:
    layers = []
    for name, module in branch.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and not isinstance(module, nn.Embedding):
            makes, reads = (weight.shape[0], weight.shape[-1] if weight.dim() == 2 else
                            weight.shape[min(1, weight.dim() - 1)])  # fmt: skip
            layers.append((f"{root}.{name}" if name else root, int(reads), int(makes)))
    made = {makes for _, _, makes in layers}
    for place, (name, reads, _) in enumerate(layers):
        if place == 0 or reads not in made:
            yield name, reads
