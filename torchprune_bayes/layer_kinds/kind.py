"""What is known about a kind of layer; one class for each, in one table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from torchprune_bayes.layer_kinds.gradients import SampleGradients

Side = Literal["in", "out"]


class LayerKind(ABC):
    """A kind of layer; a method that is not overridden does what suits an unknown layer.

    Law of the gradients: for the ``g`` of any loss, :meth:`gradients` gives the gradients that
    autograd gives for every sample by itself, in a model in eval mode that does not mix samples.
    """

    prunable: ClassVar[tuple[str, ...]] = ()
    """Tensors that pruning methods are usually applied to."""
    is_called: ClassVar[bool] = True
    """Whether its forward pass runs, and with it hooks; otherwise others use its tensors."""
    is_table: ClassVar[bool] = False
    """Whether it looks up rows, whose entries are the units."""
    is_norm: ClassVar[bool] = False
    """Whether it normalises."""
    packs_matrices: ClassVar[bool] = False
    """Whether a tensor holds several matrices, so that no unit can be cut out."""
    counts_units: ClassVar[bool] = False
    """Whether :meth:`sizes` says how many heads there are, so that no rule of a group need."""
    units_dim: ClassVar[int] = 1
    """Dimension of the activations that holds the units."""
    input_dim: ClassVar[int] = 1
    """Dimension of the weight over inputs."""
    output_dim: ClassVar[int] = 0
    """Dimension of the weight over outputs."""
    names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """The parameters that :meth:`gradients` is about."""
    has_factors: ClassVar[bool] = False
    """Whether the gradients by the weight are outer products, as Kronecker factors need."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    def weight_dim(self, side: Side) -> int:
        """Dimension of the weight that belongs to a side of the layer."""
        return self.output_dim if side == "out" else self.input_dim

    def is_matrix(self, module: nn.Module) -> bool:
        """Whether every output is one matrix times a row of inputs (a patch of a convolution)."""
        return False

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``[outputs, entries of a row]``."""
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """What :meth:`as_matrix` gave, in the shape of the weight ``like``."""
        return matrix.reshape(like.shape)

    def is_per_unit(self, module: nn.Module) -> bool | None:
        """Whether its tensors have an entry for each unit that passes; ``None`` if not known."""
        return None

    def gate_entries(self, module: nn.Module, side: Side) -> int | None:
        """Units that a gate on this side scales; ``None`` where none can be folded."""
        return None

    def uses(
        self, module: nn.Module, name: str, inputs: Sequence[Tensor], output: Any
    ) -> float | None:
        """How often each entry of a tensor is multiplied in one call; ``None`` if not known.

        Args:
            module: The layer.
            name: The tensor's name in it.
            inputs: Tensors that it was called with.
            output: What it returned.
        """
        return None

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Attributes by which the layer notes down its sizes, read off tensors after a cut.

        Args:
            name: Qualified name of the layer, for messages.
            module: The layer, still with its old tensors.
            tensors: Its own parameters and buffers after the cut.

        Raises:
            ParameterError: If the tensors do not fit each other.
        """
        return {}

    def class_for(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> type[nn.Module]:
        """The class that computes with tensors after a cut; default the one that it has.

        Args:
            module: The layer.
            tensors: Its own parameters and buffers after the cut.
        """
        return type(module)

    def has_gradients(self, module: nn.Module) -> bool:
        """Whether :meth:`gradients` is right about this layer."""
        return False

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """What is kept of the forward pass for :meth:`gradients`; default the inputs."""
        return inputs.detach()

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """Gradients of single samples by the weights, by name.

        Args:
            module: The layer.
            saved: What :meth:`saved` returned.
            g: Gradients by the layer's outputs. The first dimension is ``samples`` times any number
                of parts of a sample (windows of an image), parts of one sample side by side.
            samples: ``B``.
        """
        raise NotImplementedError


class OtherKind(LayerKind):
    """Whatever is in no table."""

    def matches(self, module: nn.Module) -> bool:
        """Always."""
        return True
