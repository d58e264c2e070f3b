"""Train and prune a small ViT that classifies images.

Runs offline in minutes on scikit-learn's digits; --data takes a folder of images with a folder per
class, or a folder of parquet files with an image and a label column (CIFAR-10), --model a trained
model:

    python integrations/hf/prune_image_classifier.py --method woodfisher --sparsity 0.8
    accelerate launch integrations/hf/prune_image_classifier.py --data cifar10
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from recipe import parser, run
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

HEAD = ["classifier"]


class Images(Dataset[dict[str, Any]]):
    """Images ``[N, 3, size, size]`` in [-1, 1] and their labels."""

    def __init__(self, pairs: Iterable[tuple[Any, int]], size: int) -> None:
        arrays, labels = zip(*pairs, strict=True)
        pixels = [torch.as_tensor(np.array(a), dtype=torch.float32) for a in arrays]
        scaled = [_to_size(p, size) for p in pixels]
        self.pixels = torch.stack(scaled) / 127.5 - 1
        self.labels = list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def load_images(source: Path | None, size: int, limit: int | None) -> tuple[Images, Images]:
    """Images to train on and images to evaluate on."""
    if source is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pairs = list(zip(digits.images * 255 / 16, map(int, digits.target), strict=True))
        return Images(pairs[:1400][:limit], size), Images(pairs[1400:][:limit], size)
    from datasets import load_dataset

    if files := sorted(map(str, source.glob("*.parquet"))):
        names = {part: [f for f in files if part in Path(f).name] for part in ("train", "test")}
        found = load_dataset("parquet", data_files=names)
    else:
        found = load_dataset("imagefolder", data_dir=str(source))
    train, test = (found[name] for name in list(found)[:2])
    image = next(name for name in train.column_names if name != "label")

    def part(split: Any) -> Images:
        chosen = split.select(range(min(limit or len(split), len(split))))
        return Images(((row[image].convert("RGB"), row["label"]) for row in chosen), size)

    return part(train), part(test)


def _to_size(pixels: torch.Tensor, size: int) -> torch.Tensor:
    grey = pixels.ndim == 2
    channels = pixels.expand(3, *pixels.shape) if grey else pixels.permute(2, 0, 1)
    return torch.nn.functional.interpolate(
        channels.unsqueeze(0), (size, size), mode="bilinear", antialias=True
    ).squeeze(0)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command."""
    options = parser(__doc__, lr=1e-3, epochs=12.0)
    options.add_argument("--img-size", type=int, default=16)
    options.add_argument("--patch-size", type=int, default=4)
    options.add_argument("--width", type=int, default=96)
    options.add_argument("--layers", type=int, default=4)
    args = options.parse_args(argv)
    set_seed(args.seed)
    train, evaluation = load_images(args.data, args.img_size, args.max_samples)
    classes = 1 + max(train.labels)
    if args.model:
        model = AutoModelForImageClassification.from_pretrained(args.model, num_labels=classes)
    else:
        config = ViTConfig(
            image_size=args.img_size,
            patch_size=args.patch_size,
            hidden_size=args.width,
            intermediate_size=4 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=3,
            num_labels=classes,
        )
        model = ViTForImageClassification(config)
    return run(args, model, train, evaluation, exclude=HEAD)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
