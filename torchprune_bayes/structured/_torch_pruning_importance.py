"""Torch-pruning's own importances, for ``shrink``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from torchprune_bayes._extras import optional
from torchprune_bayes.errors import ArgumentTypeError, ParameterError
from torchprune_bayes.layer_kinds import is_depthwise, kind_of
from torchprune_bayes.structured.importance import UnitImportance
from torchprune_bayes.wiring.groups import UnitGroup, UnitSlice


class HostImportance(UnitImportance):
    """Scores groups with an importance of torch-pruning, after conversion to its format.

    Args:
        importance: Called with a ``torch_pruning.dependency.Group``. Its weights and ``.grad`` are
            those of the model.
    """

    def __init__(self, importance: Callable[[Any], Any]) -> None:
        self._importance = importance

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Score a group as torch-pruning would; a unit of several entries gets their mean.

        Raises:
            ParameterError: If the importance fails.
        """
        their_group = as_torch_pruning_group(group, model)
        if their_group is None:
            return None
        try:
            scores = self._importance(their_group)
        except Exception as error:
            graded = any(parameter.grad is not None for parameter in model.parameters())
            remedy = "" if graded else "call `backward()` on a loss if it needs gradients, or "
            raise ParameterError(
                f"Expected {type(self._importance).__name__} to score `{group.name}`, got "
                f"{type(error).__name__}: {error}; {remedy}use an importance of this library."
            ) from error
        if not isinstance(scores, Tensor) or scores.dim() != 1:
            return None
        return scores.reshape(group.units, -1).mean(dim=1)


def as_torch_pruning_group(group: UnitGroup, model: nn.Module) -> Any:
    """Return a ``torch_pruning.dependency.Group`` with the layers of a group.

    Entries of the first layer are its roots, in the order of the units. Layers with several
    matrices in a tensor and single parameters are left out, as in torch-pruning's importances.

    Args:
        group: The group.
        model: Its model.

    Returns:
        The group, or ``None`` if no layer is of a kind that torch-pruning knows.
    """
    with optional("torch-pruning", "torch-pruning"):
        from torch_pruning._helpers import GroupItem
        from torch_pruning.dependency import Group
    result = Group()
    width = 0
    for layer, handler, piece in _layers(group, model):
        positions = piece.positions
        width = width or positions.shape[1]
        entry = [place % width for place in range(positions.shape[1])]
        item: Any = GroupItem(_dependency(layer, handler), positions.reshape(-1).tolist())
        item.root_idxs = [unit * width + each for unit in range(group.units) for each in entry]
        result._group.append(item)
    return result if len(result._group) else None


def _dependency(layer: nn.Module, handler: Callable[..., Any]) -> Any:
    from torch_pruning.dependency.dependency import Dependency
    from torch_pruning.dependency.node import Node

    node = Node(layer, None)
    return Dependency(handler, handler, node, node)


def _layers(
    group: UnitGroup, model: nn.Module
) -> Iterator[tuple[nn.Module, Callable[..., Any], UnitSlice]]:
    """Yield the layers with their side, makers first as in torch-pruning's groups."""
    pieces = sorted(group.slices, key=lambda piece: piece.role != "producer")
    for piece in pieces:
        path, _, key = piece.name.rpartition(".")
        module = model.get_submodule(path)
        handler = _handler(module, reads=piece.role == "consumer")
        if key == "weight" and handler is not None:
            turned = _is_linear(module) and kind_of(module).output_dim == 1
            yield _as_linear(module) if turned else module, handler, piece


def _handler(module: nn.Module, *, reads: bool) -> Callable[..., Any] | None:
    import torch_pruning as tp

    if _is_linear(module):
        return tp.prune_linear_in_channels if reads else tp.prune_linear_out_channels
    if is_depthwise(module):
        return tp.prune_depthwise_conv_out_channels
    if isinstance(module, _ConvNd):
        return tp.prune_conv_in_channels if reads else tp.prune_conv_out_channels
    if isinstance(module, _NormBase):
        return tp.prune_batchnorm_out_channels
    if isinstance(module, nn.LayerNorm):
        return tp.prune_layernorm_out_channels
    if isinstance(module, nn.GroupNorm):
        return tp.prune_groupnorm_out_channels
    if isinstance(module, nn.Embedding):
        return tp.prune_embedding_out_channels
    return None


def _is_linear(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind.is_matrix(module) and kind.units_dim == -1


def _as_linear(module: nn.Module) -> nn.Linear:
    """A linear layer with the weights of a ``Conv1D``, whose outputs lie along the columns."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    layer = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    layer.weight = nn.Parameter(weight.detach().t())
    if weight.grad is not None:
        layer.weight.grad = weight.grad.t()
    layer.register_parameter("bias", bias)
    return layer


def as_unit_importance(importance: Any) -> UnitImportance:
    """Return an importance of this library as it is, and wrap one of torch-pruning's.

    Raises:
        ArgumentTypeError: If it is neither.
    """
    if isinstance(importance, UnitImportance):
        return importance
    if isinstance(importance, type) or not callable(importance):
        raise ArgumentTypeError(
            "Expected `importance` to be a UnitImportance or an importance of torch-pruning, got "
            f"{importance!r}."
        )
    return HostImportance(importance)
