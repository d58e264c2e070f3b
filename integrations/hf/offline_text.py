"""Text that comes with Python, local text files, and a tokenizer trained on them offline."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HELD_OUT = 10  # every tenth piece is for evaluation
LARGEST_TOPICS = 8
WORDS_PER_SAMPLE = 40


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>"
    )


def language_texts(source: Path | None) -> tuple[str, str]:
    """Text to train on and text to evaluate on.

    Args:
        source: A text file or a folder with ``train.txt`` (else ``valid.txt``) and ``test.txt``, or
            with one file; the last tenth of a single text is for evaluation. ``None`` takes the
            documentation that comes with Python.
    """
    if source is None:
        return _split("\n\n".join(topics[name] for name in sorted(topics)))
    if source.is_file():
        return _split(source.read_text(encoding="utf-8"))
    test = source / "test.txt"
    if test.is_file():
        train = next(p for n in ("train", "valid") if (p := source / f"{n}.txt").is_file())
        return train.read_text(encoding="utf-8"), test.read_text(encoding="utf-8")
    (only,) = source.glob("*.txt")
    return _split(only.read_text(encoding="utf-8"))


def labelled_texts(source: Path | None) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Samples ``(text, label)`` to train on and to evaluate on.

    Args:
        source: A folder with ``train.tsv`` and ``dev.tsv``, text and label in each line. ``None``
            takes the documentation that comes with Python: which topic is a passage from?
    """
    if source is not None:
        return _read_table(source / "train.tsv"), _read_table(source / "dev.tsv")
    largest = sorted(topics, key=lambda name: (-len(topics[name]), name))[:LARGEST_TOPICS]
    samples = []
    for label, name in enumerate(largest):
        words = topics[name].split()
        starts = range(0, len(words) - WORDS_PER_SAMPLE, WORDS_PER_SAMPLE)
        samples += [(" ".join(words[s : s + WORDS_PER_SAMPLE]), label) for s in starts]
    random.Random(0).shuffle(samples)
    held_out = samples[::HELD_OUT]
    return [s for i, s in enumerate(samples) if i % HELD_OUT], held_out


def blocks_of(
    text: str, tokenizer: PreTrainedTokenizerFast, length: int
) -> list[dict[str, torch.Tensor]]:
    """Cut a text into samples of ``length`` tokens for a causal language model."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return [{"input_ids": block, "labels": block} for block in ids.split(length)[:-1]]


def _split(text: str) -> tuple[str, str]:
    cut = len(text) * (HELD_OUT - 1) // HELD_OUT
    return text[:cut], text[cut:]


def _read_table(path: Path) -> list[tuple[str, int]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.rsplit("\t", 1) for line in lines if line]
    return [(text, int(label)) for text, label in rows]
