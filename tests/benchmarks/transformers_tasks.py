"""The networks of ``transformers.py``: real data, sizes for a processor, dense training once.

The ViT and the GPT-2 on tiny Shakespeare are those of ``finetuned.py``: networks that it or
``structured.py`` trained can be put in the scratch folder as ``vit`` and ``shakespeare``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from tests.benchmarks import finetuned_tasks
from tests.benchmarks.minilm import minilm_folder
from tests.references.resnet20 import load_cifar10

Data = dict[str, Tensor]
WORDS, BLOCK, LENGTH = 4000, 64, 64


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Attributes:
        model: Before dense training.
        train: Samples to train, calibrate and, the last ``held_out``, choose settings on.
        test: Samples to report.
        updates: Of dense training.
        rate: Learning rate of it.
        finetuning: Updates after pruning.
        finetuning_rate: Their learning rate.
        exclude: Layers that stay dense.
        held_out: Samples of ``train`` that are neither trained nor calibrated on.
        batch: Samples of an update.
    """

    model: nn.Module
    train: Data
    test: Data
    updates: int
    rate: float
    finetuning: int = 30
    finetuning_rate: float = 5e-4
    exclude: tuple[str, ...] = ()
    held_out: int = 300
    batch: int = 32


def wikitext(data: Path) -> Task:
    """A GPT-2 of four layers and width 128 on the words of WikiText-2, from scratch."""
    texts = [
        (data / "wikitext-2" / f"{name}.txt").read_text(encoding="utf-8").replace("\n", " <eos> ")
        for name in ("valid", "test")
    ]
    counts = Counter(texts[0].split())
    counts.pop("<unk>", None)
    number = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS - 1), start=1)}
    train, test = (
        _blocks(torch.tensor([number.get(w, 0) for w in text.split()])) for text in texts
    )
    return Task(_gpt2(WORDS), train, test, updates=1000, rate=3e-3)


def shakespeare(data: Path) -> Task:
    """The GPT-2 of ``finetuned.py`` on tiny Shakespeare: three layers, tokens of its own."""
    source = finetuned_tasks.gpt2(data, Path())
    train, test = (
        {"input_ids": ids, "labels": ids}
        for ids in (_stacked(part) for part in (source.train, source.evaluation))
    )
    return Task(source.model, train, test, source.dense_updates, source.dense_rate)


def minilm(data: Path) -> Task:
    """The pretrained all-MiniLM-L6-v2 with a classifier, on SST-2."""
    folder = minilm_folder()
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    train, test = _sentences(data, folder)
    return Task(
        model, train, test, updates=60, rate=1e-4, finetuning_rate=5e-5, exclude=("classifier",)
    )


def distilbert(data: Path) -> Task:
    """A DistilBERT whose six layers begin as those of MiniLM, on SST-2."""
    folder = minilm_folder()
    source = BertForSequenceClassification.from_pretrained(folder, num_labels=2).bert
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=source.config.vocab_size,
        max_position_embeddings=source.config.max_position_embeddings,
        dim=384,
        hidden_dim=1536,
        n_layers=6,
        n_heads=12,
        num_labels=2,
    )
    model = DistilBertForSequenceClassification(config)
    _take_over(model, source)
    train, test = _sentences(data, folder)
    exclude = ("pre_classifier", "classifier")
    return Task(model, train, test, updates=60, rate=1e-4, finetuning_rate=5e-5, exclude=exclude)


def vit(data: Path) -> Task:
    """The ViT of ``finetuned.py`` on CIFAR-10: four layers, width 96 and patches of 4."""
    parts = [load_cifar10(data, "train", 10_000), load_cifar10(data, "test", 2000)]
    train, test = ({"pixel_values": x, "labels": y} for x, y in parts)
    torch.manual_seed(0)
    model = finetuned_tasks.small_vit()
    exclude = ("body.head", "body.patch_embed.proj")  # three channels are no N:M
    return Task(model, train, test, updates=800, rate=1e-3, exclude=exclude, batch=64)


TASKS: dict[str, Callable[[Path], Task]] = {
    "wikitext": wikitext,
    "shakespeare": shakespeare,
    "minilm": minilm,
    "distilbert": distilbert,
    "vit": vit,
}


def part_of(data: Data, chosen: Tensor | slice) -> Data:
    """Some samples, without the columns that are padding for all of them."""
    found = {key: value[chosen] for key, value in data.items()}
    mask = found.get("attention_mask")
    if mask is not None:
        width = int(mask.sum(1).max())
        found |= {key: found[key][:, :width] for key in ("input_ids", "attention_mask")}
    return found


def _stacked(samples: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.stack([torch.as_tensor(sample["input_ids"]) for sample in samples])


def _gpt2(words: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=words,
        n_positions=BLOCK,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _blocks(ids: Tensor) -> Data:
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    return {"input_ids": blocks, "labels": blocks}


def _sentences(data: Path, folder: Path) -> tuple[Data, Data]:
    """SST-2 with MiniLM's tokens; reported is the whole development set."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for name in ("train", "dev"):
        lines = (data / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [line.rsplit("\t", 1) for line in lines if line]
        encoded = tokenizer(
            [text for text, _ in rows],
            truncation=True,
            max_length=LENGTH,
            padding="max_length",
            return_tensors="pt",
        )
        labels = torch.tensor([int(label) for _, label in rows])
        inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        found.append({key: value[order] for key, value in (inputs | {"labels": labels}).items()})
    return found[0], found[1]


def _take_over(model: DistilBertForSequenceClassification, source: Any) -> None:
    names = {
        "attention.q_lin": "attention.self.query",
        "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value",
        "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm",
        "ffn.lin1": "intermediate.dense",
        "ffn.lin2": "output.dense",
        "output_layer_norm": "output.LayerNorm",
    }
    body = model.distilbert
    for ours, theirs in zip(body.transformer.layer, source.encoder.layer, strict=True):
        for name, other in names.items():
            ours.get_submodule(name).load_state_dict(theirs.get_submodule(other).state_dict())
    embeddings = source.embeddings
    for name in ("word_embeddings", "position_embeddings", "LayerNorm"):
        state = embeddings.get_submodule(name).state_dict()
        body.embeddings.get_submodule(name).load_state_dict(state)
