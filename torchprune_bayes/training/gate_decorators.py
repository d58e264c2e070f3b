"""Gate decorators: scaling gates behind batch norms, ranked by the effect of closing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchprune_bayes._checks import check_count, count_to_prune
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.methods.stepwise import smallest_k_with_floor


class GateDecorator(nn.Module):
    """A batch norm whose scale is a gate of its own, ``φ ⊙ norm(x)``.

    `Gate Decorator (You et al., 2019) <https://arxiv.org/abs/1909.08174>`_. The norm's scale ``γ``
    moves into the gate, ``φ = γ``, ``β ← β/γ``, ``γ ← 1``, so that the function is unchanged and
    a closed gate removes the shift too. A ``γ`` of zero is not moved. The scores are the
    sums of ``|φ ∂L/∂φ|`` over the batches seen in :func:`collect_scores`, each the first-order
    change of the loss when the gate is closed.

    Args:
        norm: The batch norm; its scale is fixed from here on.

    Attributes:
        gate: ``φ``, a parameter ``[channels]``.
        open: Boolean, ``False`` for closed gates.
        scores: ``[channels]``.

    Raises:
        ArgumentTypeError: If ``norm`` is no batch norm.

    Example:
        >>> norm = nn.BatchNorm1d(2).eval()
        >>> x = torch.randn(3, 2)
        >>> expected = norm(x)
        >>> torch.allclose(GateDecorator(norm)(x), expected)
        True
    """

    norm: _BatchNorm
    open: Tensor
    scores: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        if not isinstance(norm, _BatchNorm):
            raise ArgumentTypeError(f"Expected a batch norm, got {type(norm).__name__}.")
        self.norm = norm
        reference = norm.weight if norm.affine else norm.running_mean
        gate = torch.ones(norm.num_features, device=getattr(reference, "device", None))
        if norm.affine:
            with torch.no_grad():
                gate = torch.where(norm.weight == 0, torch.ones_like(norm.weight), norm.weight)
                norm.bias.div_(gate)
                norm.weight.div_(gate)
            norm.weight.requires_grad_(False)
        self.gate = nn.Parameter(gate)
        self.register_buffer("open", torch.ones_like(gate, dtype=torch.bool))
        self.register_buffer("scores", torch.zeros_like(gate))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and multiply by the open gates."""
        factor = self.gate * self.open
        return self.norm(x) * factor.view(1, -1, *[1] * (x.ndim - 2))

    @torch.no_grad()
    def folded(self) -> _BatchNorm:
        """The norm with the gates in its scale and shift, zero for closed gates.

        Raises:
            ArgumentError: If the norm has no scale and shift of its own.
        """
        if not self.norm.affine:
            raise ArgumentError(
                "Expected a norm with affine=True to fold gates into, got one without."
            )
        factor = self.gate * self.open
        self.norm.weight.mul_(factor)
        self.norm.bias.mul_(factor)
        self.norm.weight.requires_grad_(True)
        return self.norm


def decorate_norms(model: nn.Module) -> list[GateDecorator]:
    """Put a gate behind every batch norm of a model, in place.

    Returns:
        The gates, in the order of ``model.modules()``.

    Raises:
        ArgumentError: If the model has no batch norm inside.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> gates = decorate_norms(model)
        >>> [type(module).__name__ for module in model]
        ['Conv2d', 'GateDecorator', 'ReLU']
    """
    decorated = {gate.norm for gate in model.modules() if isinstance(gate, GateDecorator)}
    places = [
        (parent, name, child)
        for parent, name, child in _places(model)
        if isinstance(child, _BatchNorm) and child not in decorated
    ]
    if not places:
        raise ArgumentError("Expected a model with batch norms inside, got one without.")
    made = {norm: GateDecorator(norm) for norm in dict.fromkeys(child for _, _, child in places)}
    for parent, name, child in places:
        setattr(parent, name, made[child])
    return list(made.values())


def fold_gates(model: nn.Module) -> None:
    """Replace all gate decorators of a model by their norms, gates folded in; in place.

    Raises:
        ArgumentError: If a norm has no scale to fold a gate into; nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2))
        >>> gates = decorate_norms(model)
        >>> _ = close_gates(gates, 1)
        >>> fold_gates(model)
        >>> model[0].weight
        Parameter containing:
        tensor([0., 1.], requires_grad=True)
    """
    places = [
        (parent, name, child)
        for parent, name, child in _places(model)
        if isinstance(child, GateDecorator)
    ]
    if not all(gate.norm.affine for _, _, gate in places):
        raise ArgumentError("Expected norms with affine=True to fold gates into, got others.")
    folded = {gate: gate.folded() for gate in dict.fromkeys(child for _, _, child in places)}
    for parent, name, child in places:
        setattr(parent, name, folded[child])


def gate_penalty(gates: Sequence[GateDecorator]) -> Tensor:
    """``Σ |φ|`` over the open gates, to be added to the loss while all weights are trained.

    Example:
        >>> gate_penalty([GateDecorator(nn.BatchNorm1d(3))]).item()
        3.0
    """
    return torch.stack([(gate.gate.abs() * gate.open).sum() for gate in gates]).sum()


@contextmanager
def collect_scores(gates: Sequence[GateDecorator]) -> Iterator[None]:
    """Set the scores to zero, then add up ``|φ ∂L/∂φ|`` of every backward pass in the body.

    Raises:
        ArgumentError: If a gate takes no gradient.

    Example:
        >>> gate = GateDecorator(nn.BatchNorm1d(2, affine=False).eval())
        >>> with collect_scores([gate]):
        ...     for x in torch.eye(2):
        ...         gate(3 * x.unsqueeze(0)).sum().backward()
        >>> gate.scores
        tensor([3.0000, 3.0000])
    """
    if not all(gate.gate.requires_grad for gate in gates):
        raise ArgumentError("Expected gates that require gradients, got frozen ones.")

    def adding(gate: GateDecorator) -> None:
        def add(gradient: Tensor) -> None:
            gate.scores += (gradient * gate.gate.detach()).abs()

        stack.callback(gate.gate.register_hook(add).remove)

    with ExitStack() as stack:
        for gate in gates:
            gate.scores.zero_()
            adding(gate)
        yield


@torch.no_grad()
def close_gates(
    gates: Sequence[GateDecorator], amount: float | int, *, min_open: int = 1
) -> list[Tensor]:
    """Close the open gates with the smallest scores, over all norms together.

    Args:
        gates: The gates, with scores of :func:`collect_scores`.
        amount: Fraction or number of the open gates to close.
        min_open: Gates to keep open in each norm as far as the count allows.

    Returns:
        Which gates are open now, ``[channels]`` for each norm.

    Raises:
        ArgumentError: If there are no gates, or fewer open ones than ``amount``.

    Example:
        >>> gate = GateDecorator(nn.BatchNorm1d(3))
        >>> gate.scores.copy_(torch.tensor([0.3, 0.1, 0.2]))
        tensor([0.3000, 0.1000, 0.2000])
        >>> close_gates([gate], 2)
        [tensor([ True, False, False])]
    """
    check_count("min_open", min_open, minimum=0)
    if not gates:
        raise ArgumentError("Expected at least one gate, got none.")
    open_masks = [gate.open for gate in gates]
    k = count_to_prune(amount, sum(int(mask.sum()) for mask in open_masks))
    kept = smallest_k_with_floor([gate.scores for gate in gates], k, open_masks, min_open)
    for gate, mask in zip(gates, kept, strict=True):
        gate.open.copy_(mask)
    return kept


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """All modules inside a model with their parents and names, shared ones once for each place."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
