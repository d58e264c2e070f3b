"""Images in a folder per class, read on demand: ImageNet, Imagenette, TinyImageNet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchprune_bayes._extras import optional
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.examples import Split

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE = 224
_TEST_FOLDERS = ("val", "validation", "test")


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Files with their classes, resized to one size."""

    def __init__(self, files: list[str], labels: list[int], transform: Any) -> None:
        self.files, self.labels, self.transform = files, labels, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.datasets.folder import default_loader

        return self.transform(default_loader(self.files[index])), self.labels[index]


@dataclass(frozen=True)
class FolderExamples:
    """Labelled images on the disk.

    Attributes:
        files: Their paths.
        labels: ``[n]``, int64.
        size: Height and width that they are resized to.
    """

    files: tuple[str, ...]
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def loader(self, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
        """Batches of ``(images, labels)``."""
        return DataLoader(self._pictures(), batch_size, shuffle=shuffle)

    def example(self, samples: int) -> Tensor:
        """The first images."""
        pictures = self._pictures()
        return torch.stack([pictures[index][0] for index in range(min(samples, len(self)))])

    def subset(self, index: Tensor) -> FolderExamples:
        """The examples at positions ``index``."""
        files = tuple(self.files[i] for i in index.tolist())
        return FolderExamples(files, self.labels[index], self.size)

    def first(self, count: int) -> FolderExamples:
        """``count`` examples spread over the classes, or all."""
        if count >= len(self):
            return self
        return self.subset(torch.arange(count) * len(self) // count)

    def labelled(self, labels: Tensor) -> FolderExamples:
        """The same images with other labels."""
        return replace(self, labels=labels)

    def _pictures(self) -> _Pictures:
        from torchvision import transforms

        transform = transforms.Compose(
            [
                transforms.Resize(self.size * 8 // 7),
                transforms.CenterCrop(self.size),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        )
        return _Pictures(list(self.files), self.labels.tolist(), transform)


def load_folders(root: Path, size: int | None, tokenizer: str | None) -> Split:
    """Images below ``train/CLASS/`` and ``val/CLASS/``.

    Raises:
        ArgumentError: If the folder has another layout.
        MissingExtraError: If torchvision is not installed.
    """
    with optional("torchvision", "timm"):
        from torchvision.datasets import ImageFolder
    below = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if below is None or not (root / "train").is_dir():
        raise ArgumentError(
            f"Expected `{root}` to hold train/CLASS/ and val/CLASS/ with images, as torchvision's "
            "ImageFolder reads them."
        )
    try:
        train, test = ImageFolder(root / "train"), ImageFolder(below)
    except FileNotFoundError as error:
        raise ArgumentError(f"Expected a folder of images per class, got: {error}") from error
    if train.classes != test.classes:
        raise ArgumentError(
            f"Expected the same classes in `{root / 'train'}` and `{below}`, got "
            f"{len(train.classes)} and {len(test.classes)}."
        )
    parts = [
        FolderExamples(
            tuple(file for file, _ in part.samples), torch.tensor(part.targets), size or _SIZE
        )
        for part in (train, test)
    ]
    return Split(parts[0], parts[1], len(train.classes))
