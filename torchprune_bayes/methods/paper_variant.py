"""Choices of published code that differ from those that are recommended here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torchprune_bayes.errors import ArgumentError


@dataclass(frozen=True)
class PaperVariant:
    """How the published WoodFisher and CBS code differs, to reproduce its numbers.

    Args:
        across_tensors: Whether blocks of a given size may span several tensors.
        active_only: Whether blocks are cut from the remaining entries only.
        centred: Whether the mean gradient is subtracted from the gradients.
        flops_power: Scores are divided by the FLOPs per weight to this power.
        threshold: Whether the code's threshold, by which one weight more is pruned, and the epsilon
            of its scores are taken over.

    Example:
        >>> PaperVariant.of("paper").threshold, PaperVariant.of({"centred": True}).centred
        (True, True)
    """

    across_tensors: bool = False
    active_only: bool = True
    centred: bool = False
    flops_power: float = 0.0
    threshold: bool = False

    @classmethod
    def of(cls, compat: Any) -> PaperVariant:
        """The variant that an option ``compat`` names.

        Args:
            compat: A variant, a mapping of its fields, ``"paper"`` for only the threshold, or
                ``None`` for the recommended behaviour.

        Raises:
            ArgumentError: If it is something else.
        """
        if compat is None or isinstance(compat, PaperVariant):
            return compat or cls()
        if compat == "paper":
            return cls(threshold=True)
        known = [field.name for field in fields(cls)]
        if isinstance(compat, Mapping) and set(compat) <= set(known):
            return cls(**compat)
        raise ArgumentError(
            f"Expected `compat` to be None, 'paper', or a PaperVariant ({', '.join(known)}), "
            f"got {compat!r}."
        )
