"""Finding the units of a model: from the blocks of a known family, or from a run.

In plain words: a run of the model shows which entries of which tensors are removed with each other,
and every group of units is tried once on a copy. What breaks the copy is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from torchprune_bayes._checks import check_choice
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured._torch_pruning_groups import unit_group
from torchprune_bayes.structured._verification import failing_groups
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.wiring.forward import ForwardFunction
from torchprune_bayes.wiring.trace import observe
from torchprune_bayes.wiring.units import groups_of
from torchprune_bayes.wiring.unseen import read_unseen
from torchprune_bayes.wiring.whole import kept_whole

Heads: TypeAlias = Literal["whole", "dimensions", "either"]
"""Whether heads go as a whole, dimensions inside of all heads of a layer, or these if they can."""

__all__ = ["Heads", "Units", "find_groups", "find_units", "unit_group"]


@dataclass(frozen=True)
class Units:
    """The groups of a model, and what was left out.

    Attributes:
        groups: Groups that can be cut.
        left_out: Why others cannot, by the name of the layer that makes their units.
        flops: FLOPs by parameter or module, see :func:`~torchprune_bayes.costs.counted_flops`,
            where the model was run to find the groups.
        operations: Which modules and operations ran then, one after the other.
    """

    groups: Sequence[UnitGroup]
    left_out: Mapping[str, str] = field(default_factory=dict)
    flops: Mapping[str, int] | None = field(default=None, compare=False, repr=False)
    operations: Sequence[str] = field(default=(), compare=False, repr=False)


def find_groups(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ignored: Collection[nn.Module | str] = (),
    forward_fn: ForwardFunction | None = None,
    heads: Heads = "whole",
) -> list[UnitGroup]:
    """List the units of a model that can be removed without changing what the others compute.

    The units of a transformer of a known family follow from its blocks. Any other model runs once
    on the example inputs, in evaluation mode, and every operation shows which entries are removed
    with each other: the channels that an addition meets, the entries of an attention head that a
    product sums over, the halves of a gated layer. Not removed are units that are outputs of the
    model, units over which a norm takes statistics (``LayerNorm`` and the like; in front of a
    ``GroupNorm`` a unit is all that one of its groups takes statistics over), what a parametrized
    layer makes or reads, and whatever goes through an operation that is not known. Branches that
    the example does not run are run as in training, if that works; what they may read otherwise
    stays whole. Each group is tried once on a copy; see :func:`find_units` for what that leaves out
    and why.

    Args:
        model: The model; wrappers are looked through. It comes out as it went in.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments; not
            needed for a known family.
        ignored: Modules, names of modules, or names of groups to leave alone. A module stands for
            all inside it; its outputs are kept, its inputs are not protected.
        forward_fn: ``forward_fn(model, example_inputs) -> output`` for models that are called in
            another way.
        heads: ``"whole"`` lists the heads of attention; ``"dimensions"`` lists in their place the
            dimensions inside of them, of which all heads of a layer keep the same number, see
            :mod:`~torchprune_bayes.structured.head_dimensions`. It takes example inputs, and up to
            some tens of forward passes. ``"either"`` lists dimensions where all of an attention's
            can be had, and its heads elsewhere.

    Returns:
        The groups, in the order of the modules that make the units.

    Raises:
        ArgumentError: If a name in ``ignored`` is none of the model's.
        ParameterError: If the model is masked, or cannot be copied.

    Cost: three forward passes and a copy of the model. No time limit: it is linear in the size of
    the model.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        ...                       nn.Linear(16, 2))
        >>> [group] = find_groups(model, torch.ones(1, 3, 4, 4))
        >>> group.name, group.units, [(piece.name, piece.role) for piece in group.slices][:2]
        ('0', 4, [('0.weight', 'producer'), ('0.bias', 'producer')])
        >>> group.slices[-1].name, group.slices[-1].positions[1]
        ('4.weight', tensor([4, 5, 6, 7]))
    """
    units = find_units(model, example_inputs, ignored=ignored, forward_fn=forward_fn, heads=heads)
    return list(units.groups)


def find_units(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ignored: Collection[nn.Module | str] = (),
    forward_fn: ForwardFunction | None = None,
    heads: Heads = "whole",
) -> Units:
    """List the units of a model like :func:`find_groups`, and say what was left out and why.

    Arguments and errors are those of :func:`find_groups`.
    """
    from torchprune_bayes.structured.head_dimensions import dimensions_of

    check_choice("heads", heads, get_args(Heads))
    inner = unwrap(model)
    check_plain(inner)
    units, whole = _whole_units(inner, example_inputs, ignored, forward_fn)
    if heads == "whole" or not whole or (heads == "either" and example_inputs is None):
        return units
    if example_inputs is None:
        raise ArgumentError(
            "Expected `example_inputs` to tell dimensions of heads apart, got None: pass some, "
            "or heads='whole'."
        )
    finer = Units(*dimensions_of(inner, whole, example_inputs, forward_fn))
    stay = [group for group in units.groups if group.kind == "head"]
    stay = [group for group in stay if heads == "either" and _makers(group) & {*finer.left_out}]
    taken = {name for group in stay for name in _makers(group)}
    groups = [group for group in units.groups if group.kind != "head"] + stay
    groups += [group for group in finer.groups if not _makers(group) & taken]
    order = {name: place for place, (name, _) in enumerate(inner.named_modules())}
    groups.sort(key=lambda group: order[group.name.partition(":")[0]])
    of_heads = {group.name for group in whole}
    reasons = {name: why for name, why in units.left_out.items() if name not in of_heads}
    reasons |= {name: why for name, why in finer.left_out.items() if name not in taken}
    return Units(groups, reasons, units.flops, units.operations)


def _makers(group: UnitGroup) -> set[str]:
    """The layers that make the units."""
    return {p.name.rpartition(".")[0] for p in group.slices if p.role == "producer"}


def _whole_units(
    inner: nn.Module,
    example_inputs: Any,
    ignored: Collection[nn.Module | str],
    forward_fn: ForwardFunction | None,
) -> tuple[Units, list[UnitGroup]]:
    """Units of a model without wrappers, with heads as a whole, and all heads that were seen."""
    from torchprune_bayes.structured.families import family_of

    family = family_of(inner)
    if family is not None:
        try:
            known = family.groups(inner)
            if example_inputs is None or all(group.units > 1 for group in known):
                groups = without_ignored(inner, known, ignored)
                return Units(groups), [group for group in groups if group.kind == "head"]
        except ParameterError:  # another version of its blocks, or a variant
            if example_inputs is None:
                raise
    wiring = observe(inner, example_inputs, forward_fn, count_flops=True)
    result = groups_of(inner, wiring)
    chosen = without_ignored(inner, result, ignored)
    reasons = read_unseen(inner, chosen, wiring.used)
    chosen = [group for group in chosen if group.name not in reasons]
    failed = failing_groups(inner, chosen, example_inputs, forward_fn, wiring.operations)
    # A number on a module may be of the units' size by chance.
    bare = [replace(group, attributes=()) for group in chosen
            if group.name in failed and group.attributes]  # fmt: skip
    still = failing_groups(inner, bare, example_inputs, forward_fn)
    again = {group.name: group for group in bare if group.name not in still}
    reasons |= {name: why for name, why in failed.items() if name not in again}
    groups = [again.get(group.name, group) for group in chosen if group.name not in reasons]
    left_out = reasons | kept_whole(inner, wiring, result) | reasons
    heads = [group for group in chosen if group.kind == "head"]
    return Units(groups, left_out, wiring.flops, wiring.operations), heads


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
    """Refuse masked modules, and weights that a hook computes from others.

    Weights of ``torch.nn.utils.parametrize`` are followed, and left whole.

    Raises:
        ParameterError: With the first such module.
    """
    for name, module in model.named_modules():
        masked = any(f"{key[:-5]}_orig" in module._parameters for key in module._buffers)
        if masked or any(f"{key[:-2]}_v" in module._parameters for key in _weight_norms(module)):
            what = (
                "masked; call `bake(model)` first"
                if masked
                else "computed from others by a hook; use `torch.nn.utils.parametrizations`"
            )
            raise ParameterError(
                f"Expected plain parameters, got `{name or 'the model'}`, whose weight is {what}."
            )


def _weight_norms(module: nn.Module) -> list[str]:
    return [key for key in module._parameters if key.endswith("_g")]


def _made_in(group: UnitGroup, path: str) -> bool:
    makers = [piece.name for piece in group.slices if piece.role != "consumer"]
    return (
        group.name == path or any(f"{name}.".startswith(f"{path}.") for name in makers) or not path
    )
