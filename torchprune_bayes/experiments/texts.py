"""Classified texts in memory, and the transformers that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes._extras import optional
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.examples import Examples, Split
from torchprune_bayes.experiments.rows import FORMATS, Rows, read_rows

_TEXT, _LABEL = ("text", "sentence", "0"), ("label", "1")


class TextClassifier(nn.Module):
    """A transformers classifier, called with token ids ``[n, tokens]``; returns logits.

    Args:
        model: The classifier.
        padding: The padding token.
    """

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model, self.padding = model, padding

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[n, classes]``."""
        mask = (tokens != self.padding).long()
        logits: Tensor = self.model(input_ids=tokens, attention_mask=mask).logits
        return logits


def load_classifier(name: str, classes: int) -> TextClassifier:
    """A published classifier or language model with a head for a number of classes.

    Args:
        name: Name on the Hub, or a folder.
        classes: Number of classes.

    Raises:
        ArgumentError: If there is no such model.
        MissingExtraError: If transformers is not installed.
    """
    with optional("transformers", "hf"):
        from transformers import AutoModelForSequenceClassification
    tokenizer = load_tokenizer(name)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=classes, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"Expected a model of the Hub or a folder of one, got: {_first_line(error)} Name a "
            "folder with --model where the Hub cannot be reached."
        ) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    return TextClassifier(model.eval(), tokenizer.pad_token_id)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, with a token for padding.

    Raises:
        ArgumentError: If there is none.
        MissingExtraError: If transformers is not installed.
    """
    with optional("transformers", "hf"):
        from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"Expected a tokenizer beside the model `{name}`, got: {_first_line(error)} Save "
            "one there with tokenizer.save_pretrained, or name a folder that has both."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_texts(root: Path, length: int | None, tokenizer: str | None) -> Split:
    """``train.*`` and ``test.*`` with columns of texts and labels, or IMDB's folders.

    Args:
        root: Folder with the two files, or with ``train/pos/*.txt``, ``train/neg/*.txt`` and so on.
        length: Largest number of tokens of a text.
        tokenizer: The model whose tokenizer is used.

    Raises:
        ArgumentError: If the folder has another layout, or columns are missing.
    """
    parts = [_pairs(root, split) for split in ("train", "test")]
    names = sorted({label for _, labels in parts for label in labels})
    numbers = {name: number for number, name in enumerate(names)}
    assert tokenizer is not None
    made = load_tokenizer(tokenizer)
    examples = []
    for texts, labels in parts:
        tokens = made(
            texts,
            truncation=True,
            max_length=length or 256,
            padding="max_length",
            return_tensors="pt",
        )["input_ids"]
        examples.append(Examples(tokens, torch.tensor([numbers[label] for label in labels])))
    return Split(examples[0], examples[1], len(names))


def _pairs(root: Path, split: str) -> tuple[list[str], list[str]]:
    """Texts and their labels."""
    if (root / split).is_dir():
        files = sorted((root / split).glob("*/*.txt"))
        files = [file for file in files if file.parent.name != "unsup"]
        if files:
            return [file.read_text(encoding="utf-8") for file in files], [
                file.parent.name for file in files
            ]
    for path in (root / f"{split}{ending}" for ending in FORMATS):
        if path.is_file():
            return _columns(_rows(path), path)
    raise ArgumentError(
        f"Expected `{root}` to hold {split}.csv, .tsv, .jsonl or .parquet with the columns text "
        f"and label, or {split}/pos/*.txt and {split}/neg/*.txt as IMDB has them."
    )


def _rows(path: Path) -> Rows:
    rows = read_rows(str(path), has_header=True)
    if rows and "label" not in rows[0]:
        plain = read_rows(str(path), has_header=False)
        # Without a header, the first label is one of the others'; a header never is.
        if plain[0].get("1") in {row.get("1") for row in plain[1:]} - {None}:
            return plain
    return rows


def _columns(rows: Rows, path: Path) -> tuple[list[str], list[str]]:
    columns = rows[0] if rows else {}
    text = next((name for name in _TEXT if name in columns), None)
    label = next((name for name in _LABEL if name in columns), None)
    if text is None or label is None:
        raise ArgumentError(
            f"Expected the columns text and label in `{path}`, got {', '.join(columns) or 'none'}."
        )
    return [str(row[text]) for row in rows], [str(row[label]) for row in rows]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
