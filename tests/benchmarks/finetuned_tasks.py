"""The tasks of ``finetuned.py``: a model, real data, and how much training two CPU cores allow."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from tests.benchmarks.minilm import minilm_folder
from tests.benchmarks.resnet20 import prepared
from tests.integrations.scripts import recipe
from tests.references.resnet20 import load_cifar10

CLASSES = 10


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and for how many updates."""

    model: nn.Module
    train: Any
    evaluation: Any
    batch_size: int
    dense_updates: int
    dense_rate: float
    updates: int
    rate: float
    collator: Any = None
    causal: bool = False
    exclude: Sequence[str] = ()
    optimizer: str = "adamw_torch"
    mini_batch: int = 2


class Images(Dataset[dict[str, Any]]):
    """Images ``[N, 3, 32, 32]``, in training moved by up to 4 pixels and flipped."""

    def __init__(self, pixels: Tensor, labels: Tensor, *, augment: bool) -> None:
        self.pixels, self.labels, self.augment = pixels, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.pixels[index]
        if self.augment:
            if torch.rand(()) < 0.5:
                pixels = pixels.flip(2)
            down, right = torch.randint(0, 9, (2,)).tolist()
            padded = nn.functional.pad(pixels, (4, 4, 4, 4))
            pixels = padded[:, down : down + 32, right : right + 32]
        return {"pixel_values": pixels, "labels": self.labels[index]}

    def plain(self) -> Images:
        """The same images as they are, to calibrate on."""
        return Images(self.pixels, self.labels, augment=False)


class Classifier(nn.Module):
    """Any image model, called as those of transformers are."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and the cross-entropy if there are labels."""
        logits = self.body(pixel_values)
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def distilbert(data: Path, output: Path) -> Task:
    """A DistilBERT of two layers and width 128 on SST-2, from scratch."""
    with recipe("hf", "prune_text_classifier") as script:
        whole = script.labelled_texts(data / "sst2")
        tokenizer = script.train_tokenizer([text for text, _ in whole[0]], 4000)
    train, evaluation = (_sentences(tokenizer, part) for part in whole)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        dim=128,
        hidden_dim=512,
        n_layers=2,
        n_heads=4,
        num_labels=2,
        dropout=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Task(
        DistilBertForSequenceClassification(config),
        train,
        evaluation,
        batch_size=32,
        dense_updates=1100,
        dense_rate=5e-4,
        updates=110,
        rate=2e-4,
        collator=DataCollatorWithPadding(tokenizer),
        exclude=["pre_classifier", "classifier"],
    )


def minilm(data: Path, output: Path) -> Task:
    """The pretrained all-MiniLM-L6-v2 with a classifier on SST-2."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with recipe("hf", "prune_text_classifier") as script:
        whole = script.labelled_texts(data / "sst2")
    train, evaluation = (_sentences(tokenizer, part) for part in whole)
    return Task(
        BertForSequenceClassification.from_pretrained(folder, num_labels=2),
        train,
        evaluation,
        batch_size=32,
        dense_updates=120,
        dense_rate=1e-4,
        updates=30,
        rate=5e-5,
        collator=DataCollatorWithPadding(tokenizer),
        exclude=["bert.pooler.dense", "classifier"],
    )


def gpt2(data: Path, output: Path) -> Task:
    """A GPT-2 of three layers and width 128 on tiny Shakespeare, from scratch."""
    with recipe("hf", "prune_language_model") as script:
        texts = script.language_texts(data / "tinyshakespeare" / "input.txt")
        tokenizer = script.train_tokenizer(texts[:1], script.VOCABULARY)
        train, evaluation = (script.blocks_of(text, tokenizer, 64) for text in texts)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=128,
        n_layer=3,
        n_head=4,
        bos_token_id=end,
        eos_token_id=end,
    )
    return Task(
        GPT2LMHeadModel(config),
        train,
        evaluation,
        batch_size=32,
        dense_updates=700,
        dense_rate=2e-3,
        updates=60,
        rate=5e-4,
        causal=True,
        mini_batch=1,
    )


def vit(data: Path, output: Path) -> Task:
    """A ViT of timm with four layers, width 96 and patches of 4 on CIFAR-10, from scratch."""
    train, evaluation = _cifar10(data)
    return Task(
        small_vit(),
        train,
        evaluation,
        batch_size=64,
        dense_updates=800,
        dense_rate=1e-3,
        updates=50,
        rate=5e-4,
        exclude=["body.head"],
    )


def small_vit() -> Classifier:
    """The ViT of :func:`vit`."""
    body = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=96,
        depth=4,
        num_heads=3,
        num_classes=CLASSES,
    )
    return Classifier(body)


def resnet20(data: Path, output: Path) -> Task:
    """ResNet-20 on CIFAR-10, from the checkpoint that ``resnet20.py`` fine-tunes."""
    train, evaluation = _cifar10(data)
    settings = Namespace(data=data, output=output, epochs=2, rate=0.02)
    return Task(
        Classifier(prepared(settings, train.pixels, train.labels)),
        train,
        evaluation,
        batch_size=128,
        dense_updates=0,
        dense_rate=0.0,
        updates=40,
        rate=0.01,
        exclude=["body.fc"],
        optimizer="sgd",
    )


def resnet18(data: Path, output: Path) -> Task:
    """ResNet-18 as for ImageNet on CIFAR-10, from scratch."""
    train, evaluation = _cifar10(data)
    return Task(
        Classifier(torchvision.models.resnet18(num_classes=CLASSES)),
        train,
        evaluation,
        batch_size=64,
        dense_updates=800,
        dense_rate=1e-3,
        updates=40,
        rate=3e-4,
        exclude=["body.fc"],
    )


def _sentences(tokenizer: Any, part: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    encoded = tokenizer([text for text, _ in part], truncation=True, max_length=64)
    return [
        {"input_ids": ids, "labels": label}
        for ids, (_, label) in zip(encoded["input_ids"], part, strict=True)
    ]


def _cifar10(data: Path) -> tuple[Images, Images]:
    train = Images(*load_cifar10(data, "train"), augment=True)
    return train, Images(*load_cifar10(data, "test"), augment=False)


TASKS: dict[str, Callable[[Path, Path], Task]] = {
    "distilbert": distilbert,
    "minilm": minilm,
    "gpt2": gpt2,
    "vit": vit,
    "resnet20": resnet20,
    "resnet18": resnet18,
}
