"""Inputs of layers in one pass, and their weights as matrices that multiply them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torchprune_bayes.curvature.layers.padding import Rows
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.layer_kinds.convolution import patches
from torchprune_bayes.params import ParameterSpace, leaf

Update = Callable[[str, "InputMoment"], Tensor | None]
"""``update(name, moment) -> new weight``, in the shape of the tensor; ``None`` leaves it."""


@dataclass
class InputMoment:
    """``Σ x xᵀ`` over all tokens (or patches of images) of a layer's inputs.

    Attributes:
        module: The layer.
        total: ``[groups, n, n]``, float32 or the calibration's dtype; convolutions have groups.
            It may be reused where there is float64.
        tokens: Number of tokens.
    """

    module: nn.Module
    total: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, module: nn.Module, weight: Tensor) -> InputMoment:
        """Moments of no tokens."""
        groups = getattr(module, "groups", 1)
        n = matrix_of(module, weight).shape[-1]
        return cls(module, torch.zeros(groups, n, n, dtype=weight.dtype, device=weight.device))

    def add(self, product: Tensor, tokens: int) -> None:
        """Add a sum over more tokens, which other moments may have, too."""
        self.total = self.total + product if self.tokens else product
        self.tokens += tokens

    @property
    def mean(self) -> Tensor:
        """``E[x xᵀ]``, ``[groups, n, n]``; zeros where there were no tokens."""
        return self.total / max(self.tokens, 1)


def matrix_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as ``[groups, rows, n]``, where rows are outputs and columns inputs.

    Example:
        >>> layer = nn.Conv2d(4, 6, 3, groups=2)
        >>> matrix_of(layer, layer.weight).shape
        torch.Size([2, 3, 18])
    """
    groups = getattr(module, "groups", 1)
    return kind_of(module).as_matrix(weight).unflatten(0, (groups, -1))


def weight_of(module: nn.Module, matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`matrix_of`, in shape and dtype of a weight."""
    return kind_of(module).as_weight(matrix.flatten(0, 1), like).to(like)


def has_inputs(module: nn.Module, name: str) -> bool:
    """Whether a tensor is a weight that multiplies its layer's inputs from the left.

    Example:
        >>> has_inputs(nn.Linear(2, 2), "weight"), has_inputs(nn.ConvTranspose1d(1, 1, 1), "weight")
        (True, False)
    """
    kind = kind_of(module)
    return name == "weight" and kind.has_factors and kind.is_called


class Finished(Exception):  # noqa: N818  # no error
    """Ends a pass whose purpose is fulfilled."""


class _Input(NamedTuple):
    """The input of a layer; the same object may have been changed in place since."""

    tensor: Tensor
    version: int
    is_image: bool

    def is_same_as(self, other: _Input) -> bool:
        """Whether a linear layer has the same products with it."""
        unchanged = self.tensor is other.tensor and self.version == other.version
        return unchanged and not (self.is_image or other.is_image)


@dataclass
class Gathering:
    """Adds up the inputs of the layers in one pass.

    Attributes:
        moments: Moments by tensor; finished ones are removed.
        layers: The layers that each tensor is a weight of.
        rows: Gives the rows ``[tokens, n]`` of a layer's input that are not ignored.
        missing: Calls to come, as far as they are known; the pass ends with the last of them.
        finish: Called with a tensor after its last call.
    """

    moments: Mapping[str, InputMoment]
    layers: Mapping[str, Sequence[nn.Module]]
    rows: Rows
    missing: dict[str, int]
    finish: Callable[[str], None] | None = None
    _last: tuple[_Input, Tensor, int] | None = None

    def see(self, name: str, x: Tensor) -> None:
        """Record the inputs of one call."""
        if name not in self.moments:
            return
        moment = self.moments[name]
        moment.add(*self._product(moment, x))
        if name in self.missing:
            self.missing[name] -= 1
            if not self.missing[name]:
                self._complete(name)

    def _product(self, moment: InputMoment, x: Tensor) -> tuple[Tensor, int]:
        """``Σ x xᵀ`` and the number of tokens; once for layers in a row with the same input."""
        key = _Input(x, x._version, _is_convolution(moment.module))
        if self._last is None or not key.is_same_as(self._last[0]):
            rows = self._rows(moment.module, x).to(moment.total)
            self._last = key, rows.mT @ rows, rows.shape[1]
        return self._last[1:]

    def _rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input that a layer's weight multiplies, ``[groups, tokens, n]``."""
        if not _is_convolution(module):
            return self.rows(x).unsqueeze(0)
        convolution = cast("nn.Conv2d", module)
        unbatched = x.ndim == len(convolution.kernel_size) + 1
        cut = patches(convolution, x.unsqueeze(0) if unbatched else x)
        return cut.unflatten(1, (convolution.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    def _complete(self, name: str) -> None:
        if self.finish is not None:
            self.finish(name)
        if not any(self.missing.values()):
            raise Finished


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


@contextmanager
def watched(
    layers: Mapping[str, Sequence[nn.Module]],
    names: Collection[str],
    see: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Pass to ``see`` the inputs of all calls of some tensors' layers."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, [*args, *kwargs.values()][0])

    with ExitStack() as stack:
        for name in names:
            for module in layers[name]:
                # Before PyTorch's hooks, which make the weight that the call uses.
                handle = module.register_forward_pre_hook(
                    partial(hook, name), prepend=True, with_kwargs=True
                )
                stack.callback(handle.remove)
        yield


def layers_of(space: ParameterSpace) -> dict[str, list[nn.Module]]:
    """The modules that each tensor is a weight of, the listed one first."""
    modules = {t.name: [t.module] for t in space if has_inputs(t.module, t.tensor_name)}
    names = {id(t.leaf): t.name for t in space if t.name in modules}
    for module in space.model.modules():
        name = names.get(id(leaf(module, "weight")))
        if name is not None and has_inputs(module, "weight") and module not in modules[name]:
            modules[name].append(module)
    return modules
