"""Data sets by name, in the folder layouts of their libraries; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchprune_bayes.experiments.examples import Split
from torchprune_bayes.experiments.folders import load_folders
from torchprune_bayes.experiments.texts import load_texts
from torchprune_bayes.experiments.vision import Vision

_CIFAR: Mapping[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}

SOURCES: Mapping[str, Callable[[Path, int | None, str | None], Split]] = {
    "mnist": Vision(
        "MNIST",
        "MNIST/raw/train-images-idx3-ubyte and the three files beside it",
        mean=(0.1307,),
        std=(0.3081,),
    ),
    "fashion-mnist": Vision(
        "FashionMNIST",
        "FashionMNIST/raw/train-images-idx3-ubyte and the three files beside it",
        mean=(0.286,),
        std=(0.353,),
    ),
    "cifar10": Vision(
        "CIFAR10",
        "cifar-10-batches-py/data_batch_1 and the files beside it; or train-*.parquet and "
        "test-*.parquet, as the Hub has them",
        **_CIFAR,
    ),
    "cifar100": Vision(
        "CIFAR100",
        "cifar-100-python/train and the files beside it; or train-*.parquet and test-*.parquet, "
        "as the Hub has them",
        **_CIFAR,
        classes=100,
    ),
    "image folders": load_folders,
    "texts": load_texts,
}
"""Loaders by name: from a folder, the size of images, and the model whose tokenizer reads texts."""
