"""Which weights of a model pruning methods are usually applied to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune_bayes.errors import ArgumentTypeError, ParameterError, ParameterWarning
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.params._adapters import adapter_modules, has_adapters, names_inside
from torchprune_bayes.params._pairs import ParameterPair
from torchprune_bayes.params._tensors import leaf

_NOTICED = 0.1


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile``.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> unwrap(torch.compile(nn.DataParallel(layer))) is layer
        True
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"Expected `model` to be an nn.Module, got {model!r}.")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def prunable_parameters(
    model: nn.Module, *, exclude: Sequence[str | nn.Module] = ()
) -> list[tuple[nn.Module, str]]:
    """List the weights that pruning methods are usually applied to.

    These are the weights of linear and (transposed) convolution layers, of Hugging Face's
    ``Conv1D``, and the input projections of ``nn.MultiheadAttention``. Left out are biases, norms,
    embeddings, frozen weights, weights that are computed from others (parametrizations,
    ``spectral_norm``, ``weight_norm``), a weight that is tied to an embedding, the second and later
    places of other tied weights, and the output projection of ``nn.MultiheadAttention``, on which
    the hooks of torch's pruning API do not run.

    In a model with adapters (``peft``'s LoRA and the like) these are the weights of the base,
    frozen as they are, and never the adapters: they are small, and their sparsity says
    nothing about the model's. To prune adapters, list them yourself.

    Args:
        model: Any module; wrappers are looked through.
        exclude: Qualified module names or modules to leave out, with everything inside them.

    Returns:
        ``[(module, tensor name), ...]`` in the order of ``model.named_modules()``. These pairs know
        their model, so that whatever prunes them names tensors as the model does.

    Raises:
        ParameterError: If an excluded name does not exist or nothing prunable is left.

    Warns:
        ParameterWarning: If stacks of matrices in modules of no known kind, such as the fused
            experts of mixtures in ``transformers``, are more than a tenth of what is listed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [(type(module).__name__, name) for module, name in prunable_parameters(model)]
        [('Linear', 'weight'), ('Linear', 'weight')]
        >>> len(prunable_parameters(model, exclude=["2"]))
        1
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    seen = _leaves_of_other_layers(modules)
    skipped = _modules_inside(modules, exclude) | adapter_modules(modules)
    frozen_too = has_adapters(modules)
    pairs: list[tuple[nn.Module, str]] = []
    for qualified, module in modules.items():
        for name in [] if qualified in skipped else _prunable_names(module):
            tensor = leaf(module, name)
            if tensor is None or id(tensor) in seen or not tensor.is_floating_point():
                continue
            if tensor.requires_grad or frozen_too:
                seen.add(id(tensor))
                pairs.append(ParameterPair.of(model, module, name))
    if not pairs:
        raise ParameterError(
            f"Expected trainable linear or convolution weights in {type(model).__name__}, got "
            "none: set requires_grad of some, or list (module, name) pairs yourself."
        )
    stacks = _stacks_of_unknown_layers(
        {name: module for name, module in modules.items() if name not in skipped}, frozen_too
    )
    _warn_of_stacks(stacks, sum(cast(Tensor, leaf(*pair)).numel() for pair in pairs))
    return pairs


def _stacks_of_unknown_layers(modules: Mapping[str, nn.Module], frozen: bool) -> dict[str, int]:
    """Entries of the tensors of three dimensions or more, by name, that no kind of layer knows."""
    return {
        f"{qualified}.{name}": tensor.numel()
        for qualified, module in modules.items()
        if not kind_of(module).prunable and not isinstance(module, parametrize.ParametrizationList)
        for name, tensor in module.named_parameters(recurse=False)
        if tensor.ndim > 2 and len(tensor) > 1 and (tensor.requires_grad or frozen)
    }


def _warn_of_stacks(stacks: Mapping[str, int], listed: int) -> None:
    missed = sum(stacks.values())
    if missed <= _NOTICED * listed:
        return
    first, more = next(iter(stacks)), len(stacks) - 1
    warnings.warn(
        f"`{first}`{f' and {more} more' if more else ''}, with {missed / (missed + listed):.0%} of "
        "the weights, are in no layer of a known kind and so not listed: list their (module, name) "
        "pairs as well if they are to be pruned.",
        ParameterWarning,
        stacklevel=3,
    )


def _prunable_names(module: nn.Module) -> list[str]:
    names = kind_of(module).prunable
    return [name for name in names if not parametrize.is_parametrized(module, name)]


def _leaves_of_other_layers(modules: Mapping[str, nn.Module]) -> set[int]:
    return {
        id(tensor)
        for module in modules.values()
        if not _prunable_names(module)
        for tensor in module._parameters.values()
        if tensor is not None
    }


def _modules_inside(
    modules: Mapping[str, nn.Module], exclude: Sequence[str | nn.Module]
) -> set[str]:
    if isinstance(exclude, str):
        raise ArgumentTypeError(f"Expected `exclude` to be a list of names, got {exclude!r}.")
    names = {id(module): name for name, module in modules.items()}
    skipped: set[str] = set()
    for item in exclude:
        root = item if isinstance(item, str) else names.get(id(item))
        if root not in modules:
            raise ParameterError(
                f"Expected `exclude` to name modules of the model, got {item!r}: "
                "model.named_modules() lists them."
            )
        skipped |= names_inside(modules, cast(str, root))
    return skipped
