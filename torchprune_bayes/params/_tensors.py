"""One tensor to prune, as the host's pruning keeps it: a leaf, a mask, and a view of the two."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentTypeError, ParameterError
from torchprune_bayes.types import ParameterPairs


def leaf(module: nn.Module, name: str) -> Tensor | None:
    """Return the trainable tensor behind ``module.name``, pruned by the host or not."""
    tensor = module._parameters.get(f"{name}_orig")
    return tensor if tensor is not None else module._parameters.get(name)


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """Return the host's mask buffer of ``module.name``, or ``None`` if it is not pruned."""
    pruned = f"{name}_orig" in module._parameters  # else a buffer of this name is the user's own
    return module._buffers.get(f"{name}_mask") if pruned else None


def without_repeats(params: ParameterPairs) -> list[tuple[nn.Module, str]]:
    """List the pairs, the second and later places of a tied tensor left out."""
    first: dict[int, tuple[nn.Module, str]] = {}
    for module, name in as_pairs(params):
        first.setdefault(id(leaf(module, name)), (module, name))
    return list(first.values())


def as_pairs(params: ParameterPairs) -> list[tuple[nn.Module, str]]:
    """List the pairs, refusing what is none."""
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
        raise ParameterError("Expected at least one (module, tensor name) pair, got none.")
    return pairs


@dataclass(frozen=True)
class PrunableTensor:
    """One tensor of a model: where it lives and what it is called."""

    module: nn.Module
    tensor_name: str
    name: str
    """Qualified name in the model, as if it were not pruned."""
    held_mask: Tensor | None = field(default=None, compare=False)
    """A mask held elsewhere, for plain weights whose zeros are the mask."""

    @property
    def leaf(self) -> Tensor:
        """The ``nn.Parameter`` that holds the values; the same object before and after pruning."""
        tensor = leaf(self.module, self.tensor_name)
        if tensor is None:
            raise ParameterError(f"Expected a parameter `{self.name}`, got none: was it removed?")
        return tensor

    @property
    def leaf_name(self) -> str:
        """Qualified name of the leaf as it stands in ``model.named_parameters()`` now."""
        pruned = f"{self.tensor_name}_orig" in self.module._parameters
        return f"{self.name}_orig" if pruned else self.name

    @property
    def mask(self) -> Tensor:
        """Boolean mask of the entries that are still alive, shaped like the tensor."""
        alive = torch.ones_like(self.leaf, dtype=torch.bool)
        for mask in self.known_masks:
            alive &= mask.detach().to(alive.device) != 0
        return alive

    @property
    def value(self) -> Tensor:
        """The values in use, ``leaf * mask``, detached."""
        value = self.leaf.detach()
        for mask in self.known_masks:
            value = value * mask.to(value)
        return value

    @property
    def known_masks(self) -> list[Tensor]:
        """The host's mask and the held one, as far as there are any."""
        masks = (mask_of(self.module, self.tensor_name), self.held_mask)
        return [mask for mask in masks if mask is not None]
