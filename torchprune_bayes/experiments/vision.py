"""Data sets of torchvision that fit into memory, in its layout or in that of the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from torchprune_bayes._extras import optional
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.examples import Examples, Split


@dataclass(frozen=True)
class Vision:
    """A data set of torchvision that fits into memory.

    Attributes:
        name: The class in torchvision.
        layout: Expected content of a folder, for the error message.
        mean: Of the pixels, by channel.
        std: Likewise.
        classes: How many classes there are.
    """

    name: str
    layout: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int = 10

    def __call__(self, root: Path, size: int | None, tokenizer: str | None) -> Split:
        """Read both parts of a folder, normalised.

        Raises:
            ArgumentError: If the folder has another layout.
            MissingExtraError: If torchvision is not installed.
        """
        train, test = (self._examples(root, training, size) for training in (True, False))
        return Split(train, test, self.classes)

    def _examples(self, root: Path, training: bool, size: int | None) -> Examples:
        arrays = self._from_parquet(root, training)
        pixels, labels = self._from_torchvision(root, training) if arrays is None else arrays
        x = pixels.float().div_(255.0)
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
        shape = (1, -1, 1, 1)
        x = (x - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)
        if size is not None and size != x.shape[-1]:
            x = interpolate(x, size=size, mode="bilinear", antialias=True)
        return Examples(x.contiguous(), labels.long())

    def _from_torchvision(self, root: Path, training: bool) -> tuple[Tensor, Tensor]:
        with optional("torchvision", "timm"):
            from torchvision import datasets
        try:
            dataset = getattr(datasets, self.name)(root, train=training)
        except RuntimeError as error:
            raise ArgumentError(
                f"Expected {self.name} in `{root}` as torchvision lays it out, with {self.layout}."
            ) from error
        return torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)

    def _from_parquet(self, root: Path, training: bool) -> tuple[Tensor, Tensor] | None:
        """Images of a folder of the Hub, ``train-*.parquet``; ``None`` if there are none."""
        split = "train" if training else "test"
        files = sorted([*root.glob(f"{split}-*.parquet"), *root.glob(f"data/{split}-*.parquet")])
        if not files:
            return None
        with optional("pillow", "timm"):
            from PIL import Image
        with optional("pyarrow", "hf"):
            from pyarrow import concat_tables, parquet
        table = concat_tables([parquet.read_table(file) for file in files])
        images = next((name for name in ("img", "image") if name in table.column_names), None)
        labels = next((n for n in ("label", "fine_label") if n in table.column_names), None)
        if images is None or labels is None:
            raise ArgumentError(
                f"Expected the columns img and label in `{files[0]}`, got "
                f"{', '.join(table.column_names)}."
            )
        mode = "L" if len(self.mean) == 1 else "RGB"
        pixels = [
            torch.from_numpy(np.array(Image.open(BytesIO(cell["bytes"])).convert(mode)))
            for cell in table[images].to_pylist()
        ]
        return torch.stack(pixels), torch.tensor(table[labels].to_pylist())
