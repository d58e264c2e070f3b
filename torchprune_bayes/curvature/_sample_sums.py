"""What statistics that are sums over samples share: joining, checking, saving and loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.types import Masks

if TYPE_CHECKING:
    from typing_extensions import Self


class SampleSums:
    """Sums over samples of one tensor each; what they are is for the subclasses to say.

    Attributes:
        calibration: Where the samples came from; ``None`` after :meth:`load`.
        masks: Entries that were alive, by qualified name.
        count: Number of samples in the sums.
        sums: The sums, float64, by keys of the subclass.
    """

    calibration: Calibration | None = None
    masks: Masks
    count: int
    sums: dict[str, Tensor]

    def merge(self, other: Self) -> Self:
        """Add the sums of another fit of the same weights, such as another rank's.

        Raises:
            AlignmentError: If the two do not have the same live entries.
        """
        if list(self.masks) != list(other.masks):
            raise AlignmentError("Expected the same tensors in both statistics, got others.")
        self.check_fitted_to(other.masks)
        for key, value in other.sums.items():
            self.sums[key] = self.sums[key] + value.to(self.sums[key].device)
        self.count += other.count
        return self

    def check_fitted_to(self, masks: Masks) -> None:
        """Refuse tensors that this was not fitted to, or other entries of them.

        Raises:
            AlignmentError: If the live entries ``masks`` are not those of the fit.
        """
        for name, mask in masks.items():
            fitted = self.masks.get(name)
            if fitted is None or not torch.equal(fitted.to(mask.device), mask):
                found = "no such tensor" if fitted is None else "other live entries"
                raise AlignmentError(
                    f"Expected a curvature fitted to the live entries of `{name}`, got {found}: "
                    "fit it again."
                )

    def save(self, path: str | Path) -> None:
        """Write sums and masks as one safetensors file."""
        tensors = {f"mask:{name}": mask.contiguous() for name, mask in self.masks.items()}
        tensors |= {f"sum:{key}": value.contiguous() for key, value in self.sums.items()}
        metadata = {
            "kind": type(self).__name__,
            "count": str(self.count),
            "masks": json.dumps(list(self.masks)),
            "sums": json.dumps(list(self.sums)),
        }
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote; needs neither model nor data.

        Raises:
            ArgumentError: If the file holds another kind of statistic.
        """
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("kind") != cls.__name__:
                found = metadata.get("kind", "something else")
                raise ArgumentError(f"Expected a file of {cls.__name__}, got one of {found}.")
            statistic = cls()
            statistic.count = int(metadata["count"])
            statistic.masks = {
                name: file.get_tensor(f"mask:{name}") for name in json.loads(metadata["masks"])
            }
            statistic.sums = {
                key: file.get_tensor(f"sum:{key}") for key in json.loads(metadata["sums"])
            }
        return statistic
