"""All the parameters of a model, where pruning methods list weights alone."""

from __future__ import annotations

from torch import nn

from torchprune_bayes.errors import ParameterError
from torchprune_bayes.params import leaf, unwrap


def trainable_parameters(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """All trainable parameters of a model, biases and norms too, tied ones once.

    Returns:
        ``[(module, tensor name), ...]`` by the names that the tensors have in a model that is not
        pruned.

    Raises:
        ParameterError: If there are none.

    Example:
        >>> [name for _, name in trainable_parameters(nn.Sequential(nn.Linear(2, 2)))]
        ['weight', 'bias']
    """
    seen: set[int] = set()
    pairs = []
    for module in unwrap(model).modules():
        for held in list(module._parameters):
            base = held.removesuffix("_orig")
            name = base if f"{base}_mask" in module._buffers else held
            tensor = leaf(module, name)
            if tensor is not None and tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                pairs.append((module, name))
    if not pairs:
        raise ParameterError(f"Expected trainable parameters in {type(model).__name__}, got none.")
    return pairs
