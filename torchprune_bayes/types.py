"""The values that parts of the library hand to each other.

Tensors are keyed by qualified name (``"layer1.0.conv1.weight"``), the name the tensor has
in a model that is not pruned. ``(module, name)`` pairs appear only where PyTorch asks for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

ParameterPairs: TypeAlias = Iterable[tuple[nn.Module, str]]
"""What ``torch.nn.utils.prune.global_unstructured`` takes: ``[(module, "weight"), ...]``."""

Scores: TypeAlias = dict[str, Tensor]
"""Importance scores by qualified name, shaped like the tensors; the smallest are pruned first."""

Masks: TypeAlias = dict[str, Tensor]
"""Boolean masks by qualified name, shaped like the tensors; ``True`` keeps the entry."""


@dataclass(frozen=True)
class Decision:
    """What a method decided; nothing has been changed yet.

    Attributes:
        masks: Boolean masks, ``True`` keeps. Entries pruned before stay ``False``.
        updates: New values of the tensors, exactly zero where the mask is ``False``;
            ``None`` if the method moves no weights.
        scores: Importance scores that led to the masks, where the method has them.
        info: What it took: damping, scale, passes, warnings; plain numbers and strings.
    """

    masks: Masks
    updates: dict[str, Tensor] | None = None
    scores: Scores | None = None
    info: dict[str, Any] = field(default_factory=dict)
