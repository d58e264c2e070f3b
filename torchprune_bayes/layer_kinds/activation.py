"""Activations with parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchprune_bayes.layer_kinds.kind import LayerKind


class PReLUKind(LayerKind):
    """``nn.PReLU``, one slope for all units or one for each."""

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, nn.PReLU)

    def is_per_unit(self, module: nn.Module) -> bool | None:
        """With more than one slope."""
        return isinstance(module, nn.PReLU) and module.num_parameters > 1

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``num_parameters``."""
        return {"num_parameters": tensors["weight"].shape[0]}
