"""An empirical Fisher as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._files import read_tensors, reading, save_tensors
from torchprune_bayes.types import Masks


@dataclass(frozen=True)
class StoredFisher:
    """Content of the file: gradients ``[N, D]``, masks in their order, and the settings."""

    rows: Tensor
    masks: Masks
    settings: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Write the file.

        Raises:
            ArgumentError: If it cannot be written.
        """
        tensors = {f"mask:{name}": mask for name, mask in self.masks.items()}
        tensors["gradients"] = self.rows
        order = json.dumps(list(self.masks))
        save_tensors(path, tensors, {"settings": json.dumps(dict(self.settings)), "order": order})

    @classmethod
    def load(cls, path: str | Path, device: torch.device) -> StoredFisher:
        """Read the file.

        Raises:
            ArgumentError: If it is missing, damaged or of another kind.
        """
        stored = read_tensors(path, "an empirical Fisher", device=device)
        with reading(path, stored.what):
            masks = stored.prefixed("mask:")
            order = stored.json("order", list)
            fisher = cls(
                stored.tensors["gradients"],
                {name: masks[name].bool() for name in order},
                stored.json("settings", dict),
            )
            entries = sum(int(torch.count_nonzero(mask)) for mask in fisher.masks.values())
            if fisher.rows.ndim != 2 or fisher.rows.shape[1] != entries or not len(fisher.rows):
                raise ValueError(f"gradients of shape {tuple(fisher.rows.shape)}")
            if not torch.isfinite(fisher.rows).all():
                raise ValueError("gradients that are not finite")
        return fisher
