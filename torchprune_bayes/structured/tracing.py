"""Finding the units of a traced model, such as the channels of a convolutional network.

In plain words: torch-pruning follows a forward pass and tells which rows and columns must go
together. Its findings are turned into lists of positions once; after that it is not needed.

Fang, Ma, Song, Mi and Wang, 2023, "DepGraph: Towards Any Structural Pruning",
https://arxiv.org/abs/2301.12900.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torchprune_bayes._checks import check_positive
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured._forward import ForwardFunction
from torchprune_bayes.structured._host_groups import unit_group
from torchprune_bayes.structured._host_tracing import Trace, trace
from torchprune_bayes.structured._norm_groups import whole_norm_groups
from torchprune_bayes.structured.groups import AttributeRule, UnitGroup

__all__ = ["find_groups", "unit_group"]

_MODEL_NUMBERS = ("num_features", "head_hidden_size", "last_channel")


def find_groups(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ignored: Collection[nn.Module | str] = (),
    forward_fn: ForwardFunction | None = None,
    timeout_seconds: float = 60.0,
) -> list[UnitGroup]:
    """List the units of a model that can be removed without changing what the others compute.

    A transformer of a served family is read off its blocks. Any other model is traced by
    torch-pruning in evaluation mode. Left alone are then: units that are outputs of the model;
    units in front of a norm over all units (``LayerNorm`` and the like), whose removal would change
    the statistics of the others; convolutions with groups that are not depthwise; layers that run
    more than once in a forward pass; tied parameters; and units that do not own equally many
    entries. In front of a ``GroupNorm`` a unit is all that one of its groups takes statistics over.

    Args:
        model: The model; wrappers are looked through. It comes out as it went in.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments; not
            needed for a served family.
        ignored: Modules, names of modules, or names of groups to leave alone. A module stands for
            all inside it; its outputs are kept, its inputs are not protected.
        forward_fn: ``forward_fn(model, example_inputs) -> output`` for models that are called in
            another way.
        timeout_seconds: Limit of the search for coupled layers, which does not end on some graphs.

    Returns:
        The groups, in the order of the modules that make the units.

    Raises:
        ArgumentError: If a name in ``ignored`` is none of the model's, or the limit is reached.
        ParameterError: If the model is masked or parametrized, or counts heads of an attention that
            is not known.
        MissingExtraError: If torch-pruning is needed and not installed.

    Cost: one forward pass; parameters are not copied.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        ...                       nn.Linear(16, 2))
        >>> [group] = find_groups(model, torch.zeros(1, 3, 4, 4))
        >>> group.name, group.units, [(piece.name, piece.role) for piece in group.slices][:2]
        ('0', 4, [('0.weight', 'producer'), ('0.bias', 'producer')])
        >>> group.slices[-1].name, group.slices[-1].positions[1]
        ('4.weight', tensor([4, 5, 6, 7]))
    """
    from torchprune_bayes.structured.families import check_heads_are_known, family_of

    check_positive("timeout_seconds", timeout_seconds)
    inner = unwrap(model)
    check_plain(inner)
    family = family_of(inner)
    if family is not None:
        groups = family.groups(inner)
    else:
        check_heads_are_known(inner)
        groups = _traced_groups(inner, trace(inner, example_inputs, forward_fn, timeout_seconds))
    return without_ignored(inner, groups, ignored)


def without_ignored(
    model: nn.Module, groups: Sequence[UnitGroup], ignored: Collection[nn.Module | str]
) -> list[UnitGroup]:
    """Return the groups whose units are not made by an ignored module.

    Args:
        model: The model, without wrappers.
        groups: Its groups.
        ignored: Modules, names of modules, or names of groups.

    Raises:
        ArgumentError: If an entry is no module or name of this model.
    """
    paths = {module: name for name, module in model.named_modules()}
    names = {group.name for group in groups}
    inside: list[str] = []
    for entry in ignored:
        path = paths.get(entry) if isinstance(entry, nn.Module) else entry
        if path is None or path not in names | set(paths.values()):
            raise ArgumentError(
                f"Expected a module or group of the model to ignore, got {entry!r}."
            )
        inside.append(path)
    return [group for group in groups if not any(_made_in(group, path) for path in inside)]


def check_plain(model: nn.Module) -> None:
    """Refuse masked and parametrized modules, whose weights are computed from others.

    Raises:
        ParameterError: With the first such module.
    """
    for name, module in model.named_modules():
        masked = any(f"{key[:-5]}_orig" in module._parameters for key in module._buffers)
        computed = masked or hasattr(module, "parametrizations")
        if computed or any(f"{key[:-2]}_v" in module._parameters for key in _weight_norms(module)):
            what = (
                "masked; call `bake(model)` first" if masked else "parametrized; remove that first"
            )
            raise ParameterError(
                f"Expected plain parameters, got `{name or 'the model'}`, which is {what}."
            )


def _weight_norms(module: nn.Module) -> list[str]:
    return [key for key in module._parameters if key.endswith("_g")]


def _made_in(group: UnitGroup, path: str) -> bool:
    makers = [piece.name for piece in group.slices if piece.role != "consumer"]
    return (
        group.name == path or any(f"{name}.".startswith(f"{path}.") for name in makers) or not path
    )


def _traced_groups(model: nn.Module, traced: Trace) -> list[UnitGroup]:
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found = [
        _with_model_numbers(model, group)
        for host_group in traced.groups()
        if traced.is_safe(host_group)
        and (single := unit_group(host_group, traced.model)) is not None
        and (group := whole_norm_groups(model, single)) is not None
    ]
    return sorted(found, key=lambda group: place[group.name])


def _with_model_numbers(model: nn.Module, group: UnitGroup) -> UnitGroup:
    """Add the sizes that timm and torchvision keep on the model for whoever replaces its head."""
    rules = []
    for piece in group.slices:
        if piece.role == "consumer" and isinstance(_owner(model, piece.name), nn.Linear):
            size = model.get_parameter(piece.name).shape[piece.dim]
            if piece.positions.numel() == size:
                per_unit = piece.positions.shape[1]
                names = [name for name in _MODEL_NUMBERS if vars(model).get(name) == size]
                rules += [AttributeRule("", name, per_unit) for name in names]
    return replace(group, attributes=(*group.attributes, *dict.fromkeys(rules)))


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
