"""One tensor to prune, as PyTorch's pruning keeps it: a leaf, a mask, and a view of the two."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ParameterError


def is_pruned(module: nn.Module, name: str) -> bool:
    """Whether ``module.name`` is pruned by torch's pruning API: made of a leaf and a mask.

    Other hooks keep a ``<name>_orig`` too, ``torch.nn.utils.spectral_norm`` for one, without mask.
    """
    return f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers


def leaf(module: nn.Module, name: str) -> Tensor | None:
    """Return the trainable tensor behind ``module.name``, pruned or not.

    ``None`` where there is none: a missing name, or a tensor that a hook computes from others.
    """
    return module._parameters.get(f"{name}_orig" if is_pruned(module, name) else name)


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """Return the mask buffer of ``module.name``, or ``None`` if it is not pruned."""
    # Without the leaf, a buffer of this name is the user's own.
    return module._buffers.get(f"{name}_mask") if is_pruned(module, name) else None


@dataclass(frozen=True)
class PrunableTensor:
    """One tensor of a model: where it lives and what it is called."""

    module: nn.Module
    tensor_name: str
    name: str
    """Qualified name in the model, as if it were not pruned."""
    held_mask: Tensor | None = field(default=None, compare=False)
    """A mask held elsewhere, for plain weights whose zeros are the mask."""
    place: torch.device | None = field(default=None, compare=False)
    """Where :attr:`value` and :attr:`mask` are given; default where the leaf is."""
    held_value: Tensor | None = field(default=None, compare=False)
    """Values that the tensor is taken to have, such as those that a step would give it."""

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
        pruned = is_pruned(self.module, self.tensor_name)
        return f"{self.name}_orig" if pruned else self.name

    @property
    def mask(self) -> Tensor:
        """Boolean mask of the entries that remain, shaped like the tensor."""
        remaining = torch.ones_like(self.leaf, dtype=torch.bool, device=self.place)
        for mask in self.known_masks:
            remaining &= mask.detach().to(remaining.device) != 0
        return remaining

    @property
    def value(self) -> Tensor:
        """The values in use, ``leaf * mask``, detached."""
        value = self.leaf.detach() if self.held_value is None else self.held_value
        value = value.to(self.place or self.leaf.device)
        for mask in self.known_masks:
            value = value * mask.to(value)
        return value

    @property
    def known_masks(self) -> list[Tensor]:
        """PyTorch's mask and the held one, as far as there are any."""
        masks = (mask_of(self.module, self.tensor_name), self.held_mask)
        return [mask for mask in masks if mask is not None]
