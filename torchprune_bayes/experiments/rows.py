"""Rows of texts, from files or data sets of the Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchprune_bayes._extras import optional
from torchprune_bayes.errors import ArgumentError

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
"""Endings of files that are read as texts."""

Rows = Sequence[Mapping[str, Any]]


def read_rows(source: str, *, has_header: bool) -> Rows:
    """Read a file of texts, or ``hf:NAME``, ``hf:NAME@SPLIT``.

    Args:
        source: A file ending in one of :data:`FORMATS`, or a data set of the Hub.
        has_header: Whether the first line of a table names the columns; otherwise they are
            numbered.

    Raises:
        ArgumentError: If it cannot be read.
        MissingExtraError: If pyarrow or datasets is not installed.
    """
    if source.startswith("hf:"):
        return _from_hub(source.removeprefix("hf:"))
    path = Path(source)
    try:
        return _from_file(path, has_header=has_header)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ArgumentError(f"Expected a file of texts, got: {error}") from error


def _from_file(path: Path, *, has_header: bool) -> Rows:
    ending = path.suffix.lower()
    if ending == ".parquet":
        with optional("pyarrow", "hf"):
            from pyarrow import ArrowException, parquet
        try:
            return [*parquet.read_table(path).to_pylist()]
        except ArrowException as error:
            raise ArgumentError(f"Expected a parquet file, got: {error}") from error
    if ending in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8")
        whole = text.lstrip().startswith("[")
        return json.loads(text) if whole else [json.loads(x) for x in text.splitlines() if x]
    with open(path, encoding="utf-8", newline="") as file:
        if ending == ".txt":
            return [{"text": line.rstrip("\n")} for line in file if line.strip()]
        if ending == ".tsv":
            cells = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        else:
            cells = list(csv.reader(file))
    if not cells:
        return []
    names = cells[0] if has_header else [str(n) for n in range(len(cells[0]))]
    return [dict(zip(names, row, strict=False)) for row in cells[has_header:] if row]


def _from_hub(name: str) -> Rows:
    name, _, split = name.partition("@")
    with optional("datasets", "hf"):
        from datasets import load_dataset
    try:
        rows: Any = load_dataset(name, split=split or "train")
        return list(rows)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArgumentError(f"Expected a data set of the Hub, got: {reason}") from error
