"""Whether a unit that a closed gate on a norm makes zero is still zero where layers read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.wiring.forward import ForwardFunction, at_rest, run
from torchprune_bayes.wiring.groups import UnitGroup, UnitSlice


def silenced(
    model: nn.Module,
    norms: Iterable[tuple[str, UnitGroup]],
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
) -> set[str]:
    """Run a model with zeros in place of what norms return, and look at what reads them.

    A ReLU lets zeros through as they are; behind a sigmoid, or an activation with a bias of its
    own, a unit whose gate is closed goes on as a constant, which cutting it out would lose.

    Args:
        model: The model; it comes out as it went in.
        norms: Names of norms, with the group of the units that each scales.
        example_inputs: What the model is called with.
        forward_fn: How to call it otherwise.

    Returns:
        The norms all of whose readers get zeros.

    Cost: one forward pass.
    """
    norms = list(norms)
    readers = {
        id(model.get_parameter(piece.name)): piece
        for _, group in norms
        for piece in group.slices
        if piece.role == "consumer"
    }
    listener = _Listener(model, readers)
    with ExitStack() as stack:
        for name, _ in norms:
            hook = model.get_submodule(name).register_forward_hook(_zeros)
            stack.callback(hook.remove)
        stack.enter_context(at_rest(model))
        stack.enter_context(listener)
        run(model, example_inputs, forward_fn)
    return {
        name
        for name, group in norms
        if all(listener.heard.get(p.name) is False for p in group.slices if p.role == "consumer")
    }


def _zeros(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


class _Listener(TorchFunctionMode):
    """Notes whether weights are applied to anything but zeros where they read units.

    Args:
        model: The model that runs while this is entered.
        readers: What reads units, by the ``id`` of the weight.

    Attributes:
        heard: For each weight that was applied, by name, whether there was a number but zero.
    """

    def __init__(self, model: nn.Module, readers: Mapping[int, UnitSlice]) -> None:
        super().__init__()
        self.heard: dict[str, bool] = {}
        self._model, self._readers = model, readers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at what stands before a weight, its input in all functions that apply one."""
        given = [*args, *(kwargs or {}).values()]
        for before, weight in pairwise(given):
            piece = self._readers.get(id(weight))
            if piece is not None and isinstance(before, Tensor):
                layer = self._model.get_submodule(piece.name.rpartition(".")[0])
                positions = piece.positions.reshape(-1).to(before.device)
                read = before.index_select(kind_of(layer).units_dim, positions)
                heard = self.heard.get(piece.name, False)
                self.heard[piece.name] = heard or bool((read != 0).any())
        return func(*args, **(kwargs or {}))
