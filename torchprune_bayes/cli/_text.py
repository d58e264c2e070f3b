"""Texts from files or data sets, tokenised by the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.experiments.rows import FORMATS, Rows, read_rows
from torchprune_bayes.experiments.texts import load_tokenizer


@dataclass(frozen=True)
class TextOptions:
    """Conversion of rows to batches.

    Attributes:
        columns: One column of texts or two (pairs); numbers for files without a header.
        label: Column of labels; ``None`` for language models, which predict the next token.
        max_length: Largest number of tokens of a sample; the size of blocks for language models.
        batch_size: Samples per batch.
    """

    columns: tuple[str, ...] = ("text",)
    label: str | None = "label"
    max_length: int = 128
    batch_size: int = 64


def is_text(source: str) -> bool:
    """Whether ``--data`` names a file of texts or a data set of the Hub."""
    return source.startswith("hf:") or Path(source).suffix.lower() in FORMATS


def text_batches(source: str, model: nn.Module, options: TextOptions) -> list[dict[str, Any]]:
    """Read texts and make batches for a transformers model.

    Rows are shuffled with a fixed seed, because files may be sorted by label. If the model is a
    language model, texts are joined and cut into blocks whose labels are their own tokens.

    Args:
        source: A file ending in one of :data:`FORMATS`, or ``hf:NAME``, ``hf:NAME@SPLIT``.
        model: A transformers model that was loaded by name or from a folder.
        options: Columns and sizes.

    Returns:
        Dictionaries with ``input_ids``, ``attention_mask`` (both ``[samples, tokens]``, int64) and
        ``labels`` (``[samples]``, or ``[samples, tokens]`` for a language model).

    Raises:
        ArgumentError: If the file cannot be read, a column is missing, a label is unknown, or
            the model has no tokenizer.
        ArgumentTypeError: If it is not a transformers model.
        MissingExtraError: If transformers is not installed.
    """
    tokenizer = _tokenizer(model)
    rows = read_rows(source, has_header=not options.columns[0].isdigit())
    if not rows:
        raise ArgumentError(f"Expected texts in `{source}`, got none.")
    label = None if _is_language_model(model) else options.label
    for column in [*options.columns, *([label] if label is not None else [])]:
        if column not in rows[0]:
            raise ArgumentError(
                f"Expected a column {column!r} in `{source}`, got {', '.join(rows[0])}: name it "
                "with --text-column and --label-column; columns of a file without a header are "
                "numbers, from 0."
            )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [rows[index] for index in order]
    if label is None:
        return _blocks(shuffled, tokenizer, options)
    return _classified(shuffled, label, tokenizer, model, options)


def save_tokenizer(model: nn.Module, folder: Path) -> None:
    """Save the model's tokenizer with its weights, so that the folder is a complete model."""
    _tokenizer(model).save_pretrained(folder)


def _tokenizer(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None)
    if not name:
        raise ArgumentTypeError(
            f"Expected a transformers model (--model hf:NAME) for texts, got "
            f"{type(model).__name__}: pass --data as module:callable for other models."
        )
    tokenizer = load_tokenizer(name)
    if getattr(config, "pad_token_id", None) is None:
        # Classifiers that read the last token must know which tokens are padding.
        config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    return tokenizer


def _is_language_model(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("LMHeadModel", "ForCausalLM"))


def _classified(
    rows: Rows, label: str, tokenizer: Any, model: nn.Module, options: TextOptions
) -> list[dict[str, Any]]:
    numbers = _label_numbers([row[label] for row in rows], model)
    # Some tokenizers return token types that their model does not accept.
    accepted = signature(model.forward).parameters
    batches = []
    for begin in range(0, len(rows), options.batch_size):
        part = rows[begin : begin + options.batch_size]
        texts = [[str(row[column]) for row in part] for column in options.columns]
        encoded = tokenizer(
            *texts,
            truncation=True,
            max_length=options.max_length,
            padding=True,
            return_tensors="pt",
        )
        batch = {key: value for key, value in encoded.items() if key in accepted}
        batch["labels"] = torch.tensor([numbers[str(row[label])] for row in part])
        batches.append(batch)
    return batches


def _label_numbers(labels: Sequence[Any], model: nn.Module) -> dict[str, int]:
    """The class of each label: its number, the model's name for it, or its sorted rank."""
    names = sorted({str(label) for label in labels})
    own = {str(name): int(number) for name, number in model.config.label2id.items()}  # type: ignore[union-attr, operator]
    if all(name in own for name in names):
        return {name: own[name] for name in names}
    if all(name.isdigit() for name in names):
        numbers = {name: int(name) for name in names}
    else:
        numbers = {name: index for index, name in enumerate(names)}
    classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    if max(numbers.values()) >= classes:
        raise ArgumentError(
            f"Expected labels for {classes} classes of {type(model).__name__}, got "
            f"{len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
        )
    return numbers


def _blocks(rows: Rows, tokenizer: Any, options: TextOptions) -> list[dict[str, Any]]:
    texts = ["\n".join(str(row[column]) for column in options.columns) for row in rows]
    tokens = list(chain.from_iterable(tokenizer(texts)["input_ids"]))
    length = min(options.max_length, len(tokens))
    count = len(tokens) // length
    blocks = torch.tensor(tokens[: count * length]).view(count, length)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in blocks.split(options.batch_size)
    ]
