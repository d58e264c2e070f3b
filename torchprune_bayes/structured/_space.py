"""The parameters that units own, as the space of a calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.structured.groups import UnitSlice
from torchprune_bayes.structured.slicing import first_names


def space_of(
    model: nn.Module, pieces: Sequence[UnitSlice]
) -> tuple[ParameterSpace, dict[str, str]]:
    """Return the parameters that contain slices, frozen ones too, and their names by any name.

    Args:
        model: The model, without wrappers.
        pieces: Pieces of its groups; buffers are left out.
    """
    first, tensors = first_names(model)
    names = {piece.name: first[piece.name] for piece in pieces}
    names = {name: own for name, own in names.items() if isinstance(tensors[own], nn.Parameter)}
    wanted = set(names.values())
    with _thawed([tensors[name] for name in wanted]):
        places = (name.rpartition(".") for name in tensors if name in wanted)
        pairs = [(model.get_submodule(path), local) for path, _, local in places]
        return ParameterSpace(model, pairs), names


@contextmanager
def _thawed(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Treat frozen parameters as trainable: a layer that does not train can still be cut."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
