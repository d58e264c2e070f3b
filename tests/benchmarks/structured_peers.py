"""The peers of ``structured.py``: torch-pruning's own pruners, and its importances for any model.

:func:`pruned_by_host` runs ``torch_pruning.pruner.BasePruner`` with its own importances and
groups. It takes a fraction of channels, so the fraction is searched for at which the FLOPs are as
few as wanted. :class:`PeerImportance` has the same importances by their formulas for the groups of
this library, for models that torch-pruning does not trace.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchprune_bayes import Calibration
from torchprune_bayes._numerics.joint_cost import sums_of_units
from torchprune_bayes.curvature import trainable_parameters
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.structured import UnitImportance, repairing
from torchprune_bayes.structured._space import space_of
from torchprune_bayes.structured.groups import UnitGroup

SCOPES = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}
"""Settings of torch-pruning's pruner, the best of which is taken."""
HOSTS = {
    "tp magnitude": tp.importance.GroupMagnitudeImportance,
    "tp taylor": tp.importance.GroupTaylorImportance,
}
SEARCH = 12


class PeerImportance(UnitImportance):
    """An importance of torch-pruning's by its formula, on the groups of this library.

    ``"magnitude"`` sums ``w²``, ``"taylor"`` ``|w g|`` with the gradient of the mean loss, and
    ``"hessian"`` ``w² mean_n g_n²``; over the weights of a unit in each layer, then the mean over
    layers, then divided by the mean of the group.
    """

    needs_recalibration = True

    def __init__(self, kind: str, calibration: Calibration) -> None:
        self.kind, self.calibration = kind, calibration
        self._entries: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Take what each weight counts."""
        weights = [p for g in groups for p in g.slices if p.name.endswith("weight")]
        space, self._names = space_of(model, weights)
        calibration = self.calibration.with_space(space)
        values = space.values()
        if self.kind == "magnitude":
            self._entries = {name: value.square() for name, value in values.items()}
        elif self.kind == "taylor":
            found = calibration.mean_gradient()
            self._entries = {name: (value * found[name]).abs() for name, value in values.items()}
        else:
            squares = sum(rows.square().sum(0) for rows in calibration.gradients())
            assert isinstance(squares, Tensor)
            parts = squares.split([value.numel() for value in values.values()])
            self._entries = {
                name: value.square() * part.view_as(value) / calibration.num_gradients
                for (name, value), part in zip(values.items(), parts, strict=True)
            }

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Mean over the layers of a group, relative to the mean of its units."""
        pieces = [piece for piece in group.slices if piece.name in self._names]
        local = [
            sums_of_units(self._entries[self._names[p.name]].unsqueeze(0), [(p.dim, p.positions)])
            for p in pieces
        ]
        if not local:
            return None
        found = torch.stack(local).mean(0)[0].double()
        return found / found.mean()


def pruned_by_host(
    dense: nn.Module,
    example: dict[str, Tensor],
    ignored: Sequence[str],
    calibrate: Callable[[nn.Module], Calibration],
    *,
    method: str,
    scope: str,
    sparsity: float,
    repair: bool,
    dimensions: bool = False,
) -> tuple[nn.Module, float]:
    """Prune a copy by torch-pruning's own pruner until so much of the FLOPs is gone.

    Args:
        dense: The model, which is left alone.
        example: Its inputs.
        ignored: Names of layers that are not pruned.
        calibrate: Makes the data for gradients and for the repair.
        method: One of :data:`HOSTS`.
        scope: One of :data:`SCOPES`.
        sparsity: Fraction of the FLOPs.
        repair: Whether :func:`~torchprune_bayes.structured.repairing` goes round the last run.
        dimensions: Whether heads lose dimensions instead of going as a whole.

    Returns:
        The smallest loss of FLOPs that is enough: the model, and the fraction that is gone.
    """
    whole, low, high = flops(dense, example), 0.0, 1.0
    gradient = _gradient(calibrate(dense)) if method == "tp taylor" else {}

    def at(ratio: float, *, repaired: bool) -> nn.Module:
        model = copy.deepcopy(dense).eval()
        for name, parameter in model.named_parameters():
            if name in gradient:
                parameter.grad = gradient[name].to(parameter.dtype).clone()
        pruner = _pruner(model, example, ignored, HOSTS[method](), SCOPES[scope], ratio)
        pruner.prune_num_heads, pruner.prune_head_dims = not dimensions, dimensions
        with repairing(pruner, calibrate(model)) if repaired else nullcontext():
            pruner.step()
            _count_heads(model, pruner)
        model.zero_grad()
        return model

    def enough(ratio: float) -> bool:
        model = at(ratio, repaired=False)
        return _nothing_left(model) or 1 - flops(model, example) / whole >= sparsity

    for _ in range(SEARCH):
        middle = (low + high) / 2
        if enough(middle):
            high = middle
        else:
            low = middle
    model = at(high, repaired=repair)
    return model, 1 - flops(model, example) / whole


def _gradient(calibration: Calibration) -> dict[str, Tensor]:
    """Of the mean loss by all parameters, norms and biases too."""
    model = calibration.model
    everything = ParameterSpace(model, trainable_parameters(model))
    return calibration.with_space(everything).mean_gradient()


def flops(model: nn.Module, example: dict[str, Tensor]) -> int:
    """Of one forward pass, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**example)
    return int(counter.get_total_flops())


def _pruner(
    model: nn.Module,
    example: dict[str, Tensor],
    ignored: Sequence[str],
    importance: Any,
    settings: dict[str, bool],
    ratio: float,
) -> Any:
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    return tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        num_heads=heads,
        out_channel_groups={},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[model.get_submodule(name) for name in ignored],
        forward_fn=lambda traced, inputs: traced(**inputs).logits,
        **settings,
    )


def _count_heads(model: nn.Module, pruner: Any) -> None:
    """Attention of timm keeps its sizes as numbers, which torch-pruning leaves to its caller."""
    module: Any
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.attn_dim = module.qkv.out_features // 3
            module.head_dim = module.attn_dim // max(module.num_heads, 1)


def _nothing_left(model: nn.Module) -> bool:
    """Whether the ratio was so high that an attention lost all of its heads."""
    return any(m.num_heads == 0 for m in model.modules() if hasattr(m, "qkv"))
