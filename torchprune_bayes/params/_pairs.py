"""``(module, tensor name)`` pairs, and the model that a list of them belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from torchprune_bayes.errors import AlignmentError, ArgumentTypeError, ParameterError
from torchprune_bayes.params._tensors import leaf
from torchprune_bayes.types import ParameterPairs


class ParameterPair(tuple[nn.Module, str]):
    """A ``(module, tensor name)`` pair that knows its model, so that names can be the model's.

    It equals, hashes, unpacks and copies as the plain tuple does.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> pair = ParameterPair.of(model, model[0], "weight")
        >>> pair == (model[0], "weight"), pair.model is model
        (True, True)
    """

    model: nn.Module

    @classmethod
    def of(cls, model: nn.Module, module: nn.Module, name: str) -> ParameterPair:
        """The pair of a tensor of ``model``, given without wrappers."""
        pair = cls((module, name))
        pair.model = model
        return pair

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the pair has a copy of the module, which is not in this model.
        return tuple, (tuple(self),)


def as_pairs(params: ParameterPairs) -> list[tuple[nn.Module, str]]:
    """List the pairs, refusing anything else."""
    pairs = list(params)
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], nn.Module)
            and isinstance(pair[1], str)
        ):
            raise ArgumentTypeError(
                f"Expected `params` to hold (module, tensor name) pairs, got {pair!r}."
            )
    if not pairs:
        raise ParameterError(
            "Expected at least one (module, tensor name) pair, got none: "
            "prunable_parameters(model) lists a model's."
        )
    return pairs


def without_repeats(params: ParameterPairs) -> list[tuple[nn.Module, str]]:
    """List the pairs, the second and later places of a tied tensor left out."""
    first: dict[int, tuple[nn.Module, str]] = {}
    for pair in as_pairs(params):
        first.setdefault(id(leaf(*pair)), pair)
    return list(first.values())


def model_of(pairs: Sequence[tuple[nn.Module, str]]) -> nn.Module:
    """The one model that holds the modules of all pairs, as far as the pairs record it.

    Returns:
        The model; or, where no pair knows one that holds them all, a module that holds them as
        ``params[0]``, ``params[1]``, ... after their first place in the list.

    Raises:
        AlignmentError: If a layer is no longer part of the model that its pair was listed from.
    """
    modules = {module for module, _ in pairs}
    aware = [pair for pair in pairs if isinstance(pair, ParameterPair)]
    inside = {pair.model: set(pair.model.modules()) for pair in aware}
    for pair in aware:
        if pair[0] not in inside[pair.model]:
            raise AlignmentError(
                f"Expected layers of the model, got a {type(pair[0]).__name__} that was replaced "
                "or removed since the parameters were listed: list them again."
            )
    for model, members in inside.items():
        if modules <= members:
            return model
    holder = nn.Module()
    added: set[nn.Module] = set()
    for place, (module, _) in enumerate(pairs):
        if module not in added:
            holder.add_module(f"params[{place}]", module)
            added.add(module)
    return holder
