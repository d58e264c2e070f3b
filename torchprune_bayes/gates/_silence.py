"""Whether a unit that a closed gate on a norm makes zero is still zero where layers read it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

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
    heard: dict[str, bool] = {}
    with ExitStack() as stack:
        for name, group in norms:
            norm = model.get_submodule(name)
            stack.callback(norm.register_forward_hook(_zeros).remove)
            for piece in group.slices:
                if piece.role == "consumer":
                    reader = model.get_submodule(piece.name.rpartition(".")[0])
                    hook = _Listener(piece, heard)
                    stack.callback(reader.register_forward_pre_hook(hook).remove)
        stack.enter_context(at_rest(model))
        run(model, example_inputs, forward_fn)
    return {
        name
        for name, group in norms
        if all(heard.get(p.name) is False for p in group.slices if p.role == "consumer")
    }


def _zeros(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


class _Listener:
    """Notes whether a layer reads anything but zeros from units."""

    def __init__(self, piece: UnitSlice, heard: dict[str, bool]) -> None:
        self._piece, self._heard = piece, heard

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        name = self._piece.name
        if not inputs or not isinstance(inputs[0], Tensor):
            self._heard[name] = True
            return
        positions = self._piece.positions.reshape(-1).to(inputs[0].device)
        read = inputs[0].index_select(kind_of(module).units_dim, positions)
        self._heard[name] = self._heard.get(name, False) or bool((read != 0).any())
