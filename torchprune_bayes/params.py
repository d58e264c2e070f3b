"""Which tensors are pruned, by which names, and how they are seen as one vector.

In plain words: a tensor that was pruned by the host lives in ``<name>_orig`` (the leaf, an
``nn.Parameter``) and ``<name>_mask`` (a buffer), and ``<name>`` is a view made of the two. What a
method works on is always ``leaf * mask``: the optimizer may have moved masked entries of the leaf.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torchprune_bayes.errors import AlignmentError, ArgumentTypeError, ParameterError
from torchprune_bayes.types import Masks, ParameterPairs

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile``.

    Example:
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
    embeddings, frozen weights, a weight that is tied to an embedding, the second and later
    places of other tied weights, and the output projection of ``nn.MultiheadAttention``, on which
    the host's hooks do not run.

    Args:
        model: Any module; wrappers are looked through.
        exclude: Qualified module names or modules to leave out, with everything inside them.

    Returns:
        ``[(module, tensor name), ...]`` in the order of ``model.named_modules()``.

    Raises:
        ParameterError: If an excluded name does not exist or nothing prunable is left.

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
    skipped = _modules_inside(modules, exclude)
    pairs: list[tuple[nn.Module, str]] = []
    for qualified, module in modules.items():
        for name in [] if qualified in skipped else _prunable_names(module):
            tensor = leaf(module, name)
            if tensor is not None and tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                pairs.append((module, name))
    if not pairs:
        raise ParameterError(
            f"Expected trainable linear or convolution weights in {type(model).__name__}, got none."
        )
    return pairs


def leaf(module: nn.Module, name: str) -> Tensor | None:
    """Return the trainable tensor behind ``module.name``, pruned by the host or not."""
    tensor = module._parameters.get(f"{name}_orig")
    return tensor if tensor is not None else module._parameters.get(name)


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """Return the host's mask buffer of ``module.name``, or ``None`` if it is not pruned."""
    pruned = f"{name}_orig" in module._parameters  # else a buffer of this name is the user's own
    return module._buffers.get(f"{name}_mask") if pruned else None


def without_repeats(params: ParameterPairs) -> list[tuple[nn.Module, str]]:
    """List the pairs, the second and later places of a tied tensor left out."""
    first: dict[int, tuple[nn.Module, str]] = {}
    for module, name in _as_pairs(params):
        first.setdefault(id(leaf(module, name)), (module, name))
    return list(first.values())


@dataclass(frozen=True)
class PrunableTensor:
    """One tensor of a model: where it lives and what it is called."""

    module: nn.Module
    tensor_name: str
    name: str
    """Qualified name in the model, as if it were not pruned."""
    held_mask: Tensor | None = field(default=None, compare=False)
    """A mask held elsewhere, for plain weights whose zeros are the mask."""

    @property
    def leaf(self) -> Tensor:
        """The ``nn.Parameter`` that holds the values; the same object before and after pruning."""
        tensor = leaf(self.module, self.tensor_name)
        if tensor is None:
            raise ParameterError(f"Expected a parameter `{self.name}`, got none: was it removed?")
        return tensor

    @property
    def leaf_name(self) -> str:
        """Qualified name of the leaf as it stands in ``model.named_parameters()`` now."""
        pruned = f"{self.tensor_name}_orig" in self.module._parameters
        return f"{self.name}_orig" if pruned else self.name

    @property
    def mask(self) -> Tensor:
        """Boolean mask of the entries that are still alive, shaped like the tensor."""
        alive = torch.ones_like(self.leaf, dtype=torch.bool)
        for mask in self.known_masks:
            alive &= mask.detach().to(alive.device) != 0
        return alive

    @property
    def value(self) -> Tensor:
        """The values in use, ``leaf * mask``, detached."""
        value = self.leaf.detach()
        for mask in self.known_masks:
            value = value * mask.to(value)
        return value

    @property
    def known_masks(self) -> list[Tensor]:
        """The host's mask and the held one, as far as there are any."""
        masks = (mask_of(self.module, self.tensor_name), self.held_mask)
        return [mask for mask in masks if mask is not None]


class ParameterSpace(Sequence[PrunableTensor]):
    """The ordered tensors that one pruning call works on.

    Args:
        model: The model that the tensors belong to; wrappers are looked through.
        params: ``(module, tensor name)`` pairs in any iterable, a generator too; ``None`` takes
            :func:`prunable_parameters`.

    Raises:
        ParameterError: If a tensor is missing, frozen, parametrized, not part of the model,
            of no floating-point type, or listed twice (tied weights are one tensor).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> space = ParameterSpace(model)
        >>> space.names, space.numel
        (['0.weight', '1.weight'], 18)
    """

    def __init__(self, model: nn.Module, params: ParameterPairs | None = None) -> None:
        self.model = unwrap(model)
        pairs = prunable_parameters(model) if params is None else _as_pairs(params)
        qualified = {module: name for name, module in self.model.named_modules()}
        self._tensors = [_prunable_tensor(qualified, module, name) for module, name in pairs]
        _refuse_tied(self._tensors)

    @overload
    def __getitem__(self, index: int) -> PrunableTensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[PrunableTensor]: ...

    def __getitem__(self, index: int | slice) -> PrunableTensor | list[PrunableTensor]:
        return self._tensors[index]

    def __len__(self) -> int:
        return len(self._tensors)

    @cached_property
    def names(self) -> list[str]:
        """Qualified names, in order."""
        return [tensor.name for tensor in self._tensors]

    @property
    def numel(self) -> int:
        """Number of entries, alive or not."""
        return sum(tensor.leaf.numel() for tensor in self._tensors)

    def pairs(self) -> list[tuple[nn.Module, str]]:
        """The host's view of the tensors."""
        return [(tensor.module, tensor.tensor_name) for tensor in self._tensors]

    def values(self) -> dict[str, Tensor]:
        """The values in use by qualified name, detached; unpruned tensors are not copied."""
        return {tensor.name: tensor.value for tensor in self._tensors}

    def masks(self) -> Masks:
        """Boolean masks by qualified name, shaped like the tensors."""
        return {tensor.name: tensor.mask for tensor in self._tensors}

    @classmethod
    def of_pairs(cls, params: ParameterPairs) -> ParameterSpace:
        """The space of tensors whose model is not at hand; a tied tensor counts once."""
        pairs = without_repeats(params)
        modules = list({id(module): module for module, _ in pairs}.values())
        return cls(nn.ModuleList(modules), pairs)

    def restricted(self, module: nn.Module, name: str) -> ParameterSpace:
        """The space of one of its tensors alone."""
        found = [t for t in self._tensors if t.module is module and t.tensor_name == name]
        if not found:
            raise AlignmentError(
                f"Expected `{name}` of {type(module).__name__} among the calibration's parameters "
                f"({_shortened(self.names)}), got a tensor that is not one of them."
            )
        return self._of(found)

    def subset(self, names: Collection[str]) -> ParameterSpace:
        """The space of some of its tensors, given by qualified name, in its own order."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise AlignmentError(
                f"Expected names of the tensors ({_shortened(self.names)}), got {unknown[0]!r}."
            )
        return self._of([tensor for tensor in self._tensors if tensor.name in names])

    def with_masks(self, masks: Mapping[str, Tensor]) -> ParameterSpace:
        """The same tensors seen through masks of the caller's, which the model knows nothing of.

        Args:
            masks: Masks by qualified name, for any of the tensors; the host's masks hold as well.

        Example:
            >>> space = ParameterSpace(nn.Linear(2, 1))
            >>> seen = space.with_masks({"weight": torch.tensor([[True, False]])})
            >>> seen.masks()["weight"], int((seen.values()["weight"] != 0).sum())
            (tensor([[ True, False]]), 1)
        """
        return self._of([replace(t, held_mask=masks.get(t.name)) for t in self._tensors])

    def check_same_tensors(self, params: ParameterPairs) -> None:
        """Refuse pairs, in any order, that are not the tensors of this space."""
        wanted = {id(leaf(module, name)) for module, name in without_repeats(params)}
        known = {id(tensor.leaf) for tensor in self._tensors}
        if wanted != known:
            raise AlignmentError(
                f"Expected the {len(known)} parameters of the calibration, got a list of "
                f"{len(wanted)} with {len(wanted & known)} of them: pass the same list to both."
            )

    def check_alignment(self, flat: Tensor) -> None:
        """Refuse a flat vector from the host that is not the live entries, in this order.

        The host shows a method the surviving entries of ``module.<name>`` one after the other and
        nothing else, so this comparison is the only way to know which entry is which.
        """
        live = [_as_host_sees(tensor) for tensor in self._tensors]
        expected = sum(values.numel() for values in live)
        if flat.numel() != expected:
            raise AlignmentError(
                f"Expected the {expected} live entries of the calibration's parameters "
                f"({_shortened(self.names)}), got {flat.numel()}: pass the same list to the "
                "calibration and to the pruning call."
            )
        pieces = flat.detach().reshape(-1).split([values.numel() for values in live])
        for tensor, values, piece in zip(self._tensors, live, pieces, strict=True):
            if not torch.equal(values.to(piece.dtype), piece.to(values.device)):
                raise AlignmentError(
                    f"Expected the values of `{tensor.name}` at its place, got others: keep the "
                    "order of the calibration's parameters and pass no importance_scores."
                )

    def check_hookable(self) -> None:
        """Refuse tensors on which the host's forward pre-hooks cannot work."""
        for tensor in self._tensors:
            if type(tensor.module).__name__ == "NonDynamicallyQuantizableLinear":
                raise ParameterError(
                    f"Expected a layer that is called, got `{tensor.name}` of "
                    "nn.MultiheadAttention, whose hooks never run; leave it out."
                )
            if hasattr(tensor.leaf, "placements"):
                raise ParameterError(
                    f"Expected a whole tensor, got the sharded `{tensor.name}`: "
                    "decide on masks before sharding and use `keep_sparse`."
                )

    def _of(self, tensors: list[PrunableTensor]) -> ParameterSpace:
        other = object.__new__(ParameterSpace)
        other.model, other._tensors = self.model, tensors
        return other


def _as_host_sees(tensor: PrunableTensor) -> Tensor:
    # `module.<name>` is refreshed only by a forward pass, so it may lag behind `leaf * mask`;
    # inside the host's `apply` it is gone, and the leaf is what the host hands over.
    shown = getattr(tensor.module, tensor.tensor_name, tensor.leaf).detach()
    return shown[tensor.mask] if tensor.known_masks else shown.reshape(-1)


def _prunable_names(module: nn.Module) -> list[str]:
    if isinstance(module, nn.MultiheadAttention):
        return ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return []
    known = isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)) or is_hf_conv1d(module)
    return ["weight"] if known and not parametrize.is_parametrized(module, "weight") else []


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's ``Conv1D``, a linear layer with a weight ``[in, out]``."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers")


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
            raise ParameterError(f"Expected `exclude` to name modules of the model, got {item!r}.")
        skipped |= {name for name in modules if f"{name}.".startswith(f"{root}." if root else "")}
    return skipped


def _as_pairs(params: ParameterPairs) -> list[tuple[nn.Module, str]]:
    pairs = list(params)
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], nn.Module)
            and isinstance(pair[1], str)
        ):
            raise ArgumentTypeError(
                f"Expected `params` to hold (module, tensor name) pairs, got {pair!r}."
            )
    if not pairs:
        raise ParameterError("Expected at least one (module, tensor name) pair, got none.")
    return pairs


def _prunable_tensor(
    qualified: Mapping[nn.Module, str], module: nn.Module, name: str
) -> PrunableTensor:
    kind = type(module).__name__
    if module not in qualified:
        raise ParameterError(f"Expected a module of the model, got a {kind} that is not in it.")
    full = ".".join(part for part in (qualified[module], name) if part)
    if parametrize.is_parametrized(module, name):
        raise ParameterError(f"Expected a plain tensor, got the parametrized `{full}`.")
    tensor = leaf(module, name)
    if tensor is None:
        raise ParameterError(f"Expected a parameter `{full}`, got none in {kind}.")
    if is_lazy(tensor):
        raise ParameterError(f"Expected a tensor with a shape, got the uninitialized `{full}`.")
    if not tensor.is_floating_point():
        raise ParameterError(f"Expected floating-point weights, got {tensor.dtype} in `{full}`.")
    if not tensor.requires_grad:
        raise ParameterError(f"Expected a trainable tensor, got `{full}` with requires_grad=False.")
    return PrunableTensor(module, name, full)


def _refuse_tied(tensors: Sequence[PrunableTensor]) -> None:
    seen: dict[int, str] = {}
    for tensor in tensors:
        if id(tensor.leaf) in seen:
            raise ParameterError(
                f"Expected every tensor once, got `{seen[id(tensor.leaf)]}` again as "
                f"`{tensor.name}`: tied weights are one tensor."
            )
        seen[id(tensor.leaf)] = tensor.name


def _shortened(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
