"""What is known about a kind of layer: how its weights' gradients follow from what passed it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from torchprune_bayes.curvature.layers.gradients import SampleGradients


class LayerRule(ABC):
    """A kind of layer.

    Law: for the ``g`` of any loss, :meth:`gradients` gives the gradients that autograd gives for
    every sample by itself, in a model in eval mode that does not mix samples.
    """

    names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """The parameters that the rule is about."""
    has_factors: ClassVar[bool] = False
    """Whether the gradients by the weight are outer products, as Kronecker factors need."""

    @abstractmethod
    def applies_to(self, module: nn.Module) -> bool:
        """Whether this is such a layer."""

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """What is kept of the forward pass; default the inputs."""
        return inputs.detach()

    @abstractmethod
    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """Gradients by the weights, by name.

        Args:
            module: The layer.
            saved: What :meth:`saved` returned.
            g: Gradients by the layer's outputs. The first dimension is ``samples`` times any number
                of parts of a sample (windows of an image), parts of one sample side by side.
            samples: ``B``.
        """
