"""Write scikit-learn's 1797 real images of digits as an ImageFolder, a folder per class."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

TRAINING_IMAGES = 1400


def write_digits(folder: Path, limit: int | None = None) -> Path:
    """Write ``train/<class>/`` and ``validation/<class>/``; what is there already is left alone.

    Args:
        folder: Where to write.
        limit: Images in all; default all of them.

    Returns:
        The folder.
    """
    if (folder / "validation").is_dir():
        return folder
    digits = load_digits()
    images, labels = digits.images[:limit], digits.target[:limit]
    share = TRAINING_IMAGES / len(digits.images)
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        split = "train" if index < share * len(images) else "validation"
        target = folder / split / str(label)
        target.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype("uint8"), mode=None)
        image.save(target / f"{index:04d}.png")
    return folder


if __name__ == "__main__":
    print(write_digits(Path(sys.argv[1])))
