"""Tiny Hugging Face models, data and Trainers, the same at every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import DistilBertConfig, DistilBertForSequenceClassification, TrainingArguments

from torchprune_bayes.gates import attach_gates


class Sentences(Dataset[dict[str, Any]]):
    """Token sequences whose class is whether the first token is large."""

    def __init__(self, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, 30, (size, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": int(ids[0] > 16), "text": "not for the model"}


def classifier(seed: int = 0) -> DistilBertForSequenceClassification:
    """A DistilBERT with one layer of width 16."""
    torch.manual_seed(seed)
    config = DistilBertConfig(
        vocab_size=30, dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=8
    )
    return DistilBertForSequenceClassification(config)


class Gated(nn.Module):
    """A network with gates and the interface of a Hugging Face model."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        attach_gates(self.body)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(input_ids.float() / 30)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Two epochs of four steps each."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(**(options | changes))
