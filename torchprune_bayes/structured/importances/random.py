"""Units at random, the baseline for all others."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_count
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.importance import UnitImportance


class RandomImportance(UnitImportance):
    """Uniform scores, which depend on the seed, the group's name and its size only.

    The global random generators are not used.

    Args:
        seed: Another seed gives other scores.

    Raises:
        ArgumentError: If the seed is negative.
        ArgumentTypeError: If it is no int.

    Example:
        >>> group = UnitGroup("fc1", "hidden", 3, ())
        >>> first = RandomImportance(seed=1).score(group, nn.Identity())
        >>> torch.equal(first, RandomImportance(seed=1).score(group, nn.Identity()))
        True
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        check_count("seed", seed, minimum=0)
        self.seed = seed

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor:
        """Draw scores.

        Args:
            group: The group.
            model: Not used.
        """
        key = f"{self.seed}/{group.name}/{group.units}".encode()
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(key).digest()[:6], "big")
        )
        return torch.rand(group.units, dtype=torch.float64, generator=generator)
