"""Units in front of a ``GroupNorm``: channels that share their statistics go together."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from torchprune_bayes.structured.groups import AttributeRule, UnitGroup


def whole_norm_groups(model: nn.Module, group: UnitGroup) -> UnitGroup | None:
    """Join the channels of each group of a ``GroupNorm`` into one unit.

    Mean and variance are taken over these channels, so that removing some of them would change the
    others; removing all of them does not, once ``num_groups`` follows.

    Args:
        model: The model.
        group: A group with channels as units.

    Returns:
        The group itself if there is no such norm; ``None`` if several norms, or the order of the
        channels in one, do not let units fall together with their groups.

    Example:
        >>> import torch
        >>> from torchprune_bayes.structured.groups import UnitSlice
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
        >>> units = torch.arange(4)[:, None]
        >>> slices = tuple(UnitSlice(name, 0, units, "norm") for name in ("0.bias", "1.weight"))
        >>> joined = whole_norm_groups(model, UnitGroup("0", "channel", 4, slices))
        >>> joined.units, joined.slices[0].positions.tolist(), joined.attributes[0].attribute
        (2, [[0, 1], [2, 3]], 'num_groups')
    """
    norms = {
        piece.name.rpartition(".")[0]: piece.positions
        for piece in group.slices
        if isinstance(model.get_submodule(piece.name.rpartition(".")[0]), nn.GroupNorm)
    }
    widths = {name: _width(model.get_submodule(name)) for name in norms}
    if not widths:
        return group
    joined, name = max((width, name) for name, width in widths.items())
    if norms[name].shape[1] != 1 or group.units % joined:
        return None
    order = norms[name][:, 0].argsort()
    if any(_splits(norms[name][order], joined, width) for name, width in widths.items()):
        return None
    slices = tuple(
        replace(piece, positions=piece.positions[order].reshape(group.units // joined, -1))
        for piece in group.slices
    )
    rules = [
        AttributeRule(name, "num_groups", norms[name].shape[1] * joined // width)
        for name, width in widths.items()
    ]
    attributes = [replace(rule, per_unit=rule.per_unit * joined) for rule in group.attributes]
    return replace(
        group, units=group.units // joined, slices=slices, attributes=(*attributes, *rules)
    )


def _width(norm: nn.Module) -> int:
    assert isinstance(norm, nn.GroupNorm)
    return norm.num_channels // norm.num_groups


def _splits(positions: Tensor, joined: int, width: int) -> bool:
    """Whether some of a norm's groups, ``width`` channels each, lie in more than one unit."""
    rows = positions.reshape(len(positions) // joined, -1).sort(dim=1).values
    if rows.shape[1] % width:
        return True
    blocks = rows.reshape(-1, width)
    return bool((blocks // width != blocks[:, :1] // width).any())
