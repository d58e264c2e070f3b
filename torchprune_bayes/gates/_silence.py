"""Whether a unit that a closed gate on a norm makes zero is still zero where layers read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
        stack.enter_context(_zeroed(model.get_submodule(name) for name, _ in norms))
        stack.enter_context(at_rest(model))
        stack.enter_context(listener)
        run(model, example_inputs, forward_fn)
    return {
        name
        for name, group in norms
        if all(listener.heard.get(p.name) is False for p in group.slices if p.role == "consumer")
    }


@contextmanager
def _zeroed(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Zeros in place of what norms return."""
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(_zeros).remove)
        yield


def silent_in_block(block: nn.Module, last: int) -> set[int]:
    """Run a residual block on its own, with zeros in place of what its norms return.

    Args:
        block: A block with ``conv1`` and ``bn1`` to ``conv{last}`` and ``bn{last}``; it comes out
            as it went in.
        last: The number of its convolutions.

    Returns:
        The norms whose zeros the next convolution gets as zeros, and the last one if an input of
        zeros leaves the block as zeros. None of a block that does not run on one feature map.

    Cost: one forward pass of the block on 16 x 16 pixels.
    """
    heard: dict[int, bool] = {}
    norms = [module for module in block.modules() if kind_of(module).is_norm]
    with ExitStack() as stack, at_rest(block):
        for place in range(2, last + 1):
            reader = block.get_submodule(f"conv{place}")
            stack.callback(reader.register_forward_pre_hook(_noting(heard, place - 1)).remove)
        stack.enter_context(_zeroed(norms))
        weight = block.get_parameter("conv1.weight")
        groups = int(block.get_submodule("conv1").groups)  # type: ignore[arg-type]
        try:
            output = block(weight.new_zeros(1, weight.shape[1] * groups, 16, 16))
        except Exception:
            return set()
    heard[last] = not isinstance(output, Tensor) or bool(output.any())
    return {place for place, numbers in heard.items() if not numbers}


def _noting(heard: dict[int, bool], place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard[place] = heard.get(place, False) or bool(inputs[0].any())

    return note


def silent_in_stem(model: nn.Module, norm: str, block: str) -> bool:
    """Whether zeros pass the modules between the norm of a stem and the first block as zeros."""
    children = dict(model.named_children())
    names = [*children]
    inside = block.partition(".")[0]
    if norm not in names or inside not in names:
        return True  # no such norm, or its activation is no module
    between = [children[name] for name in names[names.index(norm) + 1 : names.index(inside)]]
    weight = next(model.parameters())
    units = children[norm].get_parameter("weight").numel()
    with at_rest(model):
        try:
            value = nn.Sequential(*between)(weight.new_zeros(1, units, 16, 16))
        except Exception:
            return False
    return not bool(value.any())


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
