"""``nn.MultiheadAttention`` and the linear layer inside, which it uses without calling it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchprune_bayes.layer_kinds.kind import LayerKind
from torchprune_bayes.layer_kinds.linear import LinearKind

# The rows of `in_proj_weight` are shared out between query, key and value.
_READ_BY = {"q_proj_weight": (0,), "k_proj_weight": (1,), "v_proj_weight": (2,)}


class MultiheadAttentionKind(LayerKind):
    """The input projections, packed into one tensor or in three."""

    prunable = ("in_proj_weight", *_READ_BY)
    packs_matrices = True

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, nn.MultiheadAttention)

    def uses(
        self, module: nn.Module, name: str, inputs: Sequence[Tensor], output: Any
    ) -> float | None:
        """Tokens of what the projection reads."""
        read = _READ_BY.get(name, (0, 1, 2))
        return sum(inputs[i].numel() / inputs[i].shape[-1] for i in read) / len(read)


class UncalledLinearKind(LinearKind):
    """Its output projection: hooks on it never run."""

    prunable = ()
    is_called = False

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return type(module).__name__ == "NonDynamicallyQuantizableLinear"
