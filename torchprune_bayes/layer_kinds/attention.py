"""``nn.MultiheadAttention`` and the linear layer inside, which it uses without calling it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchprune_bayes.errors import ParameterError
from torchprune_bayes.layer_kinds.fewer_heads import FewerHeads
from torchprune_bayes.layer_kinds.kind import LayerKind, Side
from torchprune_bayes.layer_kinds.linear import LinearKind

# The rows of `in_proj_weight` are shared out between query, key and value.
_READ_BY = {"q_proj_weight": (0,), "k_proj_weight": (1,), "v_proj_weight": (2,)}


class MultiheadAttentionKind(LayerKind):
    """The input projections, packed into one tensor or in three."""

    prunable = ("in_proj_weight", *_READ_BY)
    counts_units = True

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, nn.MultiheadAttention)

    def uses(
        self, module: nn.Module, name: str, inputs: Sequence[Tensor], output: Any
    ) -> float | None:
        """Tokens of what the projection reads."""
        read = _READ_BY.get(name, (0, 1, 2))
        return sum(inputs[i].numel() / inputs[i].shape[-1] for i in read) / len(read)

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``num_heads``; the width of a head and of the input stay."""
        if "in_proj_weight" not in tensors or module.bias_k is not None or module.add_zero_attn:
            raise ParameterError(
                f"Expected attention with one input projection and no further keys, got `{name}`, "
                "whose heads cannot be cut."
            )
        heads, rest = divmod(len(tensors["in_proj_weight"]), 3 * module.head_dim)
        if rest or tensors["in_proj_weight"].shape[1] != module.embed_dim:
            raise ParameterError(f"Expected whole heads to be cut out of `{name}`, got parts.")
        return {"num_heads": heads}

    def class_for(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> type[nn.Module]:
        """One that can have fewer heads, if there are."""
        weight = tensors.get("in_proj_weight")
        fewer = weight is not None and len(weight) < 3 * weight.shape[1]
        return FewerHeads if fewer and type(module) is nn.MultiheadAttention else type(module)


class UncalledLinearKind(LinearKind):
    """Its output projection: hooks on it never run."""

    prunable = ()
    is_called = False

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return type(module).__name__ == "NonDynamicallyQuantizableLinear"

    def gate_entries(self, module: nn.Module, side: Side) -> int | None:
        """None, since a gate is a hook."""
        return None
