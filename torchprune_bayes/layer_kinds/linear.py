"""Linear layers, on vectors or on sequences of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from torchprune_bayes.layer_kinds.gradients import DenseGradients, SampleGradients
from torchprune_bayes.layer_kinds.kind import LayerKind, Side
from torchprune_bayes.layer_kinds.outer_products import OuterProducts


class _MatrixKind(LayerKind):
    """What linear layers have in common."""

    prunable: ClassVar[tuple[str, ...]] = ("weight",)
    units_dim = -1
    has_factors = True

    def is_matrix(self, module: nn.Module) -> bool:
        """Always."""
        return True

    def has_gradients(self, module: nn.Module) -> bool:
        """Always."""
        return True

    def uses(
        self, module: nn.Module, name: str, inputs: Sequence[Tensor], output: Any
    ) -> float | None:
        """Tokens."""
        return inputs[0].numel() / inputs[0].shape[-1]

    def gate_entries(self, module: nn.Module, side: Side) -> int | None:
        """Outputs or inputs."""
        weight = cast(Tensor, module.weight)
        return int(weight.shape[self.weight_dim(side)])


class LinearKind(_MatrixKind):
    """``nn.Linear``: ``g aᵀ``, summed over all dimensions between the first and the last."""

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, nn.Linear)

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``out_features`` and ``in_features``."""
        outputs, inputs = tensors["weight"].shape
        return {"out_features": outputs, "in_features": inputs}

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerKind.gradients`."""
        outputs, inputs = _columns(g, samples), _columns(saved, samples)
        entries = inputs[0].numel()
        shape = (outputs.shape[2], inputs.shape[2])
        weight = OuterProducts(outputs, inputs.__getitem__, entries, shape)
        return {"weight": weight, "bias": DenseGradients(outputs.sum((1, 3)))}


class HuggingFaceConv1DKind(_MatrixKind):
    """Hugging Face's ``Conv1D``, a linear layer with its weight transposed: ``a gᵀ``."""

    input_dim = 0
    output_dim = 1

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind; that package is not imported."""
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers")

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The transposed weight."""
        return weight.mT

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The transposed matrix."""
        return matrix.mT

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``nf`` and ``nx``."""
        inputs, outputs = tensors["weight"].shape
        return {"nf": outputs, "nx": inputs}

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerKind.gradients`."""
        outputs, inputs = _columns(g, samples), _columns(saved, samples)
        entries = outputs[0].numel()
        shape = (inputs.shape[2], outputs.shape[2])
        weight = OuterProducts(inputs, outputs.__getitem__, entries, shape, inputs_left=True)
        return {"weight": weight, "bias": DenseGradients(outputs.sum((1, 3)))}


def _columns(values: Tensor, samples: int) -> Tensor:
    """``[B, ..., k]`` as ``[B, 1, k, T]``."""
    return values.reshape(samples, 1, -1, values.shape[-1]).mT
