"""Small data sets in the layouts of the real ones: bars whose place is the class."""

from __future__ import annotations

import csv
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

CLASSES = 10


def bars(images: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Grey images ``[n, side, side]``, uint8, and labels ``[n]``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % CLASSES
    pixels = torch.randint(60, (images, side, side), dtype=torch.uint8, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[2 * label + 3 : 2 * label + 6] = 250
    return pixels, labels


def write_mnist(folder: Path, images: int = 200, name: str = "MNIST") -> Path:
    """The four files of MNIST or Fashion-MNIST."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    pixels, labels = bars(images, 28)
    for split in ("train", "t10k"):
        sizes = b"".join(size.to_bytes(4, "big") for size in (0x803, images, 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(sizes + pixels.numpy().tobytes())
        sizes = b"".join(size.to_bytes(4, "big") for size in (0x801, images))
        found = labels.to(torch.uint8).numpy().tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(sizes + found)
    return folder


def write_cifar(folder: Path, images: int = 120, label: str = "label") -> Path:
    """CIFAR as a folder of the Hub has it, PNG files in parquet."""
    from PIL import Image
    from pyarrow import parquet, table

    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = bars(images, 32)
    files = []
    for image in pixels:
        file = BytesIO()
        Image.fromarray(image.numpy()).convert("RGB").save(file, "png")
        files.append({"bytes": file.getvalue(), "path": None})
    for split in ("train", "test"):
        found = table({"img": files, label: labels.tolist()})
        parquet.write_table(found, folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_folders(folder: Path, images: int = 80, classes: int = CLASSES) -> Path:
    """``train/CLASS/`` and ``val/CLASS/`` with PNG files."""
    from PIL import Image

    pixels, labels = bars(images, 40)
    for split in ("train", "val"):
        for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            target = folder / split / f"n{label % classes:02d}"
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).convert("RGB").save(target / f"{index}.png")
    return folder


def write_texts(folder: Path, rows: int = 64) -> Path:
    """``train.csv`` and ``test.csv`` with two classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            words = ("a good film", "a bad film")
            writer.writerows(
                [words[row % 2] + " indeed" * (row % 3), row % 2] for row in range(rows)
            )
    return folder


def write_transformer(folder: Path, hub: str) -> Path:
    """A small DistilBERT or GPT-2 with random weights, and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        DistilBertConfig,
        DistilBertModel,
        GPT2Config,
        GPT2Model,
        PreTrainedTokenizerFast,
    )

    words = ["[PAD]", "[UNK]", "a", "good", "bad", "film", "indeed"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    if hub.startswith("gpt2"):
        config = GPT2Config(vocab_size=len(words), n_positions=16, n_embd=8, n_layer=2, n_head=2)
        model = GPT2Model(config)
    else:
        model = DistilBertModel(
            DistilBertConfig(
                vocab_size=len(words),
                max_position_embeddings=16,
                n_layers=2,
                n_heads=2,
                dim=8,
                hidden_dim=16,
            )
        )
    model.save_pretrained(folder)
    return folder
