"""Files: reading that refuses what is damaged in a sentence, writing that is whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchprune_bayes.errors import ArgumentError, TorchPruneBayesError


@contextmanager
def reading(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn whatever fails in the ``with`` block into one sentence about the file.

    A damaged or foreign file can make its reader fail in any way, so every exception but the
    library's own is treated as damage; the cause stays attached.

    Args:
        path: The file or folder.
        what: What it should hold, as the message names it: ``"masks"``.

    Raises:
        ArgumentError: If the block fails.

    Example:
        >>> with reading("list.json", "a list"):
        ...     json.loads("[1,")
        Traceback (most recent call last):
        torchprune_bayes.errors.ArgumentError: Expected a list in list.json, got a file that is
        damaged or of another kind (JSONDecodeError: Expecting value: line 1 column 4 (char 3)).
    """
    try:
        yield
    except TorchPruneBayesError:
        raise
    except FileNotFoundError as error:
        raise ArgumentError(f"Expected {what} in {path}, got no such file.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArgumentError(
            f"Expected {what} in {path}, got a file that cannot be read ({reason})."
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ArgumentError(
            f"Expected {what} in {path}, got a file that is damaged or of another kind "
            f"({type(error).__name__}: {reason})."
        ) from error


@dataclass(frozen=True)
class StoredTensors:
    """What a safetensors file holds.

    Attributes:
        path: The file.
        what: What it should hold, for messages.
        tensors: By name.
        metadata: Text by key.
    """

    path: Path
    what: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def json(self, key: str, kind: type) -> Any:
        """The value of JSON under ``key`` of the metadata.

        Raises:
            ArgumentError: If there is none, or none of the type ``kind``.
        """
        with reading(self.path, self.what):
            value = json.loads(self.metadata[key])
            if type(value) is not kind:
                raise TypeError(f"{key} is {value!r}, not {kind.__name__}")
        return value

    def prefixed(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the rest of their names."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def read_tensors(
    path: str | os.PathLike[str], what: str = "tensors", *, device: torch.device | str = "cpu"
) -> StoredTensors:
    """Read a safetensors file as a whole.

    Args:
        path: The file.
        what: What it should hold, as the message names it.
        device: Where the tensors are put.

    Raises:
        ArgumentError: If the file is missing, damaged, or no safetensors file.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tensors(f"{folder}/a", {"x": torch.ones(2)}, {"kind": '"ones"'})
        ...     stored = read_tensors(f"{folder}/a")
        >>> stored.tensors["x"], stored.json("kind", str)
        (tensor([1., 1.]), 'ones')
    """
    with reading(path, what), safe_open(path, framework="pt") as file:
        names = list(file.keys())  # the file is no mapping
        tensors = {name: file.get_tensor(name) for name in names}
        metadata = file.metadata() or {}
    return StoredTensors(
        Path(path), what, {name: value.to(device) for name, value in tensors.items()}, metadata
    )


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all, of tensors in any layout that may overlap.

    Raises:
        ArgumentError: If it cannot be written.
    """
    plain = _apart(tensors)
    write_whole(path, lambda draft: save_file(plain, draft, dict(metadata or {}) or None))


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``path``, which takes its place when it is on the disk.

    Whoever is killed at any moment leaves the older file or the new one. A draft that failed is
    removed.

    Raises:
        ArgumentError: If it cannot be written.
    """
    path = Path(path)
    draft = path.with_name(f"{path.name}.part")
    with writing(path):
        try:
            write(draft)
            sync(draft)
            os.replace(draft, path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the system refuses in the ``with`` block into one sentence about the file.

    Raises:
        ArgumentError: If the block raises an ``OSError``, or safetensors raises its own error.
    """
    try:
        yield
    except TorchPruneBayesError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ArgumentError(f"Expected to write {path}, got: {reason}.") from error


def sync(path: Path) -> None:
    """Return when what was written is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder, and find out whether files can be written there, before a long computation.

    Raises:
        ArgumentError: If they cannot.
    """
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
            pass


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored = tensor.detach().contiguous()
        address = stored.untyped_storage().data_ptr()
        plain[name] = stored.clone() if address in seen else stored
        seen.add(address)
    return plain
