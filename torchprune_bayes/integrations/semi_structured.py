"""Converting linear layers pruned 2:4 to PyTorch's semi-structured sparse format.

>>> layer = nn.Linear(8, 4, bias=False)
>>> follows_pattern(layer.weight)
False
>>> with torch.no_grad():
...     _ = layer.weight.view(4, 2, 4)[..., 2:].zero_()
>>> follows_pattern(layer.weight)
True
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.params import unwrap

logger = logging.getLogger("torchprune_bayes")


def follows_pattern(weight: Tensor, kept: int = 2, size: int = 4) -> bool:
    """Whether at most ``kept`` of every ``size`` inputs of each output are nonzero.

    Args:
        weight: Weight of a linear layer, ``[outputs, inputs]``.
        kept: ``N`` of an N:M pattern.
        size: ``M``.
    """
    if weight.dim() != 2 or weight.shape[1] % size:
        return False
    nonzero = weight.detach() != 0
    return bool((nonzero.unflatten(1, (-1, size)).sum(-1) <= kept).all())


def to_semi_structured(model: nn.Module, *, exclude: Collection[str] = ()) -> list[str]:
    """Store the 2:4 weights of linear layers in the packed format of GPU kernels; for inference.

    Prune with ``pattern="2:4"``, train the remaining weights, save the model, and convert it last:
    packed weights can be neither trained nor saved. Whether it is faster depends on the GPU and on
    the sizes; small products are not faster.

    Args:
        model: In half precision on a GPU of compute capability 8.0 or more; changed in place.
        exclude: Names of modules not to convert, with everything inside them.

    Returns:
        The names of the layers that were converted: all ``nn.Linear`` whose weights have the
        pattern.

    Raises:
        ArgumentError: If no layer has the pattern.
        ParameterError: If PyTorch cannot pack one of them: on a CPU, in single precision with
            cuSPARSELt, or with a size that is not a multiple of the GPU's tiles. Nothing has
            changed then.

    Cost: half the memory of the weights, and 1/8 of that for the indices (half precision).
    """
    inner = unwrap(model)
    layers = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear)
        and not any(name == part or name.startswith(f"{part}.") for part in exclude)
    }
    names = [name for name, layer in layers.items() if follows_pattern(layer.weight)]
    if not names:
        raise ArgumentError(
            'Expected a linear layer pruned with pattern="2:4" and without hooks, got none among '
            f"{len(layers)}."
        )
    packed = {name: _packed(name, layers[name].weight) for name in names}
    for name, weight in packed.items():
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    logger.info("Packed %d of %d linear layers.", len(packed), len(layers))
    return names


def _packed(name: str, weight: Tensor) -> Tensor:
    try:
        packed: Tensor = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
    except RuntimeError as error:  # also NotImplementedError, of builds without the kernels
        raise ParameterError(
            f"Expected `{name}.weight` to fit the sparse kernels of a GPU, got "
            f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}: {error}"
        ) from error
    return packed
