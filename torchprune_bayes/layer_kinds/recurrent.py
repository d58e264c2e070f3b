"""Recurrent layers, and others with several matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from torchprune_bayes.layer_kinds.kind import LayerKind


class RecurrentKind(LayerKind):
    """Recurrent layers and cells, whose gates lie side by side in one tensor."""

    units_dim = -1

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, (RNNBase, RNNCellBase))

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``input_size`` and ``hidden_size``."""
        layer = "_l0" if isinstance(module, RNNBase) else ""
        return {
            "input_size": tensors[f"weight_ih{layer}"].shape[1],
            "hidden_size": tensors[f"weight_hh{layer}"].shape[1],
        }


class BilinearKind(LayerKind):
    """``nn.Bilinear``, a matrix for each output."""

    packs_matrices = True

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, nn.Bilinear)
