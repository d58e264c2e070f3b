"""The ordered tensors of one pruning call, and whether they are what PyTorch shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torchprune_bayes.errors import AlignmentError, ParameterError
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.params._layers import prunable_parameters, unwrap
from torchprune_bayes.params._pairs import ParameterPair, as_pairs, model_of, without_repeats
from torchprune_bayes.params._tensors import PrunableTensor, leaf
from torchprune_bayes.types import Masks, ParameterPairs


class ParameterSpace(Sequence[PrunableTensor]):
    """The ordered tensors that one pruning call works on.

    Args:
        model: The model that the tensors belong to; wrappers are looked through.
        params: ``(module, tensor name)`` pairs in any iterable, a generator too; ``None`` takes
            :func:`prunable_parameters`.

    Raises:
        ParameterError: If a tensor is missing, parametrized, not part of the model, of no
            floating-point type, or listed twice (tied weights are one tensor). A frozen one that
            is listed is pruned as any other: gradients are those of copies.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> space = ParameterSpace(model)
        >>> space.names, space.numel
        (['0.weight', '1.weight'], 18)
    """

    def __init__(self, model: nn.Module, params: ParameterPairs | None = None) -> None:
        self.model = unwrap(model)
        pairs = prunable_parameters(model) if params is None else as_pairs(params)
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
    def devices(self) -> list[torch.device]:
        """Where the tensors are; each device once, in order."""
        return list(dict.fromkeys(tensor.leaf.device for tensor in self._tensors))

    @property
    def numel(self) -> int:
        """Number of entries, pruned ones included."""
        return sum(tensor.leaf.numel() for tensor in self._tensors)

    def pairs(self) -> list[tuple[nn.Module, str]]:
        """The tensors as ``(module, tensor name)``; these pairs know the model."""
        return [ParameterPair.of(self.model, t.module, t.tensor_name) for t in self._tensors]

    def values(self) -> dict[str, Tensor]:
        """The values in use by qualified name, detached; unpruned tensors are not copied."""
        return {tensor.name: tensor.value for tensor in self._tensors}

    def masks(self) -> Masks:
        """Boolean masks by qualified name, shaped like the tensors."""
        return {tensor.name: tensor.mask for tensor in self._tensors}

    @classmethod
    def of_pairs(cls, params: ParameterPairs) -> ParameterSpace:
        """The space of tensors without their model; a tied tensor counts once.

        Pairs of :func:`prunable_parameters` and of a space know their model, and names are its
        names. Where no model is known that holds all pairs, names say so: ``params[0].weight`` is
        the weight of the first module in the list.

        Example:
            >>> model = nn.Sequential(nn.Tanh(), nn.Linear(2, 2))
            >>> ParameterSpace.of_pairs(prunable_parameters(model)).names
            ['1.weight']
            >>> ParameterSpace.of_pairs([(model[1], "weight")]).names
            ['params[0].weight']
        """
        pairs = without_repeats(params)
        return cls(model_of(pairs), pairs)

    def restricted(self, module: nn.Module, name: str) -> ParameterSpace:
        """The space of one of its tensors alone."""
        matching = [t for t in self._tensors if t.module is module and t.tensor_name == name]
        if not matching:
            raise AlignmentError(
                f"Expected `{name}` of {type(module).__name__} among the calibration's parameters "
                f"({_shortened(self.names)}), got a tensor that is not one of them."
            )
        return self._of(matching)

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
            masks: Masks by qualified name, for any of the tensors; those of PyTorch hold as well.

        Example:
            >>> space = ParameterSpace(nn.Linear(2, 1))
            >>> seen = space.with_masks({"weight": torch.tensor([[True, False]])})
            >>> seen.masks()["weight"], int((seen.values()["weight"] != 0).sum())
            (tensor([[ True, False]]), 1)
        """
        return self._of([replace(t, held_mask=masks.get(t.name)) for t in self._tensors])

    def at(self, device: torch.device) -> ParameterSpace:
        """The same tensors with values and masks given on a device, wherever the model is."""
        return self._of([replace(tensor, place=device) for tensor in self._tensors])

    def with_values(self, values: Mapping[str, Tensor]) -> ParameterSpace:
        """The same tensors as if they had other values, which the model knows nothing of.

        Args:
            values: Values by qualified name, for any of the tensors.

        Example:
            >>> space = ParameterSpace(nn.Linear(2, 1))
            >>> space.with_values({"weight": torch.tensor([[3.0, 4.0]])}).values()["weight"]
            tensor([[3., 4.]])
        """
        return self._of([replace(t, held_value=values.get(t.name)) for t in self._tensors])

    def check_same_tensors(self, params: ParameterPairs) -> None:
        """Refuse pairs, in any order, that are not the tensors of this space."""
        passed = {id(leaf(module, name)) for module, name in without_repeats(params)}
        own = {id(tensor.leaf) for tensor in self._tensors}
        if passed != own:
            raise AlignmentError(
                f"Expected the {len(own)} parameters of the calibration, got a list of "
                f"{len(passed)} with {len(passed & own)} of them: pass the same list to both."
            )

    def check_in_model(self) -> None:
        """Refuse tensors whose module the model does not have any more.

        Raises:
            AlignmentError: If a layer was replaced or removed since the space was made.
        """
        modules = dict(self.model.named_modules())
        for tensor in self._tensors:
            place = tensor.name.removesuffix(tensor.tensor_name).removesuffix(".")
            if modules.get(place) is not tensor.module:
                raise AlignmentError(
                    f"Expected the layer `{place}` that the model had when its parameters were "
                    "listed, got another or none: list the parameters and make the Calibration "
                    "again after replacing layers."
                )

    def check_alignment(self, flat: Tensor) -> None:
        """Refuse a flat vector from PyTorch that is not the remaining entries, in this order.

        PyTorch shows a method the remaining entries of ``module.<name>`` one after the other and
        nothing else, so this comparison is the only way to know which entry is which.
        """
        remaining = [_as_pytorch_sees(tensor) for tensor in self._tensors]
        expected = sum(values.numel() for values in remaining)
        if flat.numel() != expected:
            raise AlignmentError(
                f"Expected the {expected} remaining entries of the calibration's parameters "
                f"({_shortened(self.names)}), got {flat.numel()}: pass the same list to the "
                "calibration and to the pruning call."
            )
        parts = flat.detach().reshape(-1).split([values.numel() for values in remaining])
        for tensor, values, part in zip(self._tensors, remaining, parts, strict=True):
            if not torch.equal(values.to(part.dtype), part.to(values.device)):
                raise AlignmentError(
                    f"Expected the values of `{tensor.name}` at its place, got others: keep the "
                    "order of the calibration's parameters and pass no importance_scores."
                )

    def check_hookable(self) -> None:
        """Refuse tensors on which PyTorch's forward pre-hooks cannot work."""
        for tensor in self._tensors:
            if not kind_of(tensor.module).is_called:
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


def _as_pytorch_sees(tensor: PrunableTensor) -> Tensor:
    # `module.<name>` is refreshed only by a forward pass, so it may lag behind `leaf * mask`;
    # inside PyTorch's `apply` it is gone, and the leaf is what PyTorch hands over.
    shown = getattr(tensor.module, tensor.tensor_name, tensor.leaf).detach()
    return shown[tensor.mask] if tensor.known_masks else shown.reshape(-1)


def _prunable_tensor(
    qualified: Mapping[nn.Module, str], module: nn.Module, name: str
) -> PrunableTensor:
    kind = type(module).__name__
    if module not in qualified:
        raise ParameterError(f"Expected a module of the model, got a {kind} that is not in it.")
    full = ".".join(part for part in (qualified[module], name) if part)
    if parametrize.is_parametrized(module, name):
        raise ParameterError(
            f"Expected a plain tensor, got the parametrized `{full}`: call "
            "torch.nn.utils.parametrize.remove_parametrizations first."
        )
    tensor = leaf(module, name)
    if tensor is None:
        computed = name in vars(module)
        raise ParameterError(
            f"Expected a parameter `{full}`, got one that a hook computes from others "
            "(spectral_norm, weight_norm): leave it out, or remove the hook first."
            if computed
            else f"Expected a parameter `{full}`, got none in {kind}."
        )
    if is_lazy(tensor):
        raise ParameterError(f"Expected a tensor with a shape, got the uninitialized `{full}`.")
    if not tensor.is_floating_point():
        raise ParameterError(f"Expected floating-point weights, got {tensor.dtype} in `{full}`.")
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
