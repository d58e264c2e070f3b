"""Damaged files are refused in one sentence; a file is written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.damage import flipped, truncated
from torchprune_bayes._files import (
    check_writable,
    read_tensors,
    save_tensors,
    write_whole,
)
from torchprune_bayes.errors import ArgumentError


def test_tensors_of_any_layout_come_back(tmp_path: Path) -> None:
    memory = torch.randn(2, 3, 4, 5)
    tensors = {
        "whole": memory,
        "part": memory[:, 1],
        "turned": memory.to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 2),
        "mask": memory > 0,
    }
    save_tensors(tmp_path / "file", tensors, {"a": "[1]"})
    stored = read_tensors(tmp_path / "file")
    assert all(torch.equal(stored.tensors[name], value) for name, value in tensors.items())
    assert stored.json("a", list) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "damaged or of another kind"),
        (b"hello", "damaged or of another kind"),
        (bytes(100), "damaged or of another kind"),
        (b"\xff" * 100, "damaged or of another kind"),
    ],
)
def test_what_is_no_file_of_tensors_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(ArgumentError, match=f"Expected masks in .*file, got .*{message}"):
        read_tensors(tmp_path / "file", "masks")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="Expected tensors in "):
        read_tensors(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "3", "null"])
def test_metadata_of_another_kind_is_refused(tmp_path: Path, text: str | None) -> None:
    save_tensors(tmp_path / "file", {"x": torch.ones(1)}, {} if text is None else {"list": text})
    with pytest.raises(ArgumentError, match=r"Expected tensors in .*, got .*another kind"):
        read_tensors(tmp_path / "file").json("list", list)


@given(st.data())
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "file"
    save_tensors(path, {"x": torch.arange(6.0), "y": torch.ones(2, dtype=torch.bool)}, {"k": "[]"})
    content = path.read_bytes()
    damage = data.draw(st.one_of(flipped(content), truncated(content)))
    path.write_bytes(damage)
    with suppress(ArgumentError):  # harmless in a value; no other error in any place
        read_tensors(path).json("k", list)


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(draft: Path) -> None:
        draft.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArgumentError, match=r"Expected to write .*file/x, got: .*Not a directory"):
        save_tensors(tmp_path / "file" / "x", {"x": torch.ones(1)})
    with pytest.raises(ArgumentError, match=r"Expected to write .*file, got: File exists"):
        check_writable(tmp_path / "file")


def test_a_folder_that_can_be_written_is_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
