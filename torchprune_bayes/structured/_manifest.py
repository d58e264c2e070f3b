"""Description of a shrunk model as plain JSON: sizes, ties, and numbers on modules."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.wiring.units import SCALES

FORMAT, VERSION = "torchprune_bayes.shrunk", 1

Value: TypeAlias = int | float | tuple[int, ...]


@dataclass(frozen=True)
class TensorRecord:
    """Size and type of one tensor."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorRecord:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Manifest:
    """The structure of a shrunk model.

    Attributes:
        tensors: Sizes and types by qualified name, one entry for each distinct tensor.
        aliases: Further names of tied tensors, each with the name under which it is stored.
        attributes: Numbers by module and attribute.
        sha256: Checksum of all this and the file of tensors; ``None`` if not known.
    """

    tensors: Mapping[str, TensorRecord]
    aliases: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    sha256: str | None = None

    def to_json(self) -> str:
        """Serialise the manifest.

        Example:
            >>> manifest = Manifest({"w": TensorRecord((2, 3), "float32")})
            >>> Manifest.from_json(manifest.to_json()) == manifest
            True
        """
        sections = {
            "tensors": {
                name: {"shape": record.shape, "dtype": record.dtype}
                for name, record in self.tensors.items()
            },
            "aliases": self.aliases,
            "attributes": self.attributes,
        }
        lines = [f'"format": {json.dumps(FORMAT)}', f'"version": {VERSION}']
        if self.sha256 is not None:
            lines.append(f'"sha256": {json.dumps(self.sha256)}')
        lines += [f"{json.dumps(name)}: {_lines(entries)}" for name, entries in sections.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read and validate a manifest.

        Raises:
            ArgumentError: If the text is not JSON, is of another format or version, or holds
                anything other than names, sizes and whole numbers.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArgumentError(f"Expected a manifest in JSON, got: {error}.") from error
        kind = (
            (content.get("format"), content.get("version")) if isinstance(content, dict) else None
        )
        if kind != (FORMAT, VERSION):
            raise ArgumentError(
                f"Expected a manifest of format {FORMAT!r}, version {VERSION}, got {kind}."
            )
        return cls(
            _mapping(content, "tensors", _record),
            _mapping(content, "aliases", _name),
            _mapping(content, "attributes", _values),
            _text(content.get("sha256")),
        )


def numbers_of(module: nn.Module) -> dict[str, Value]:
    """Return the whole numbers, tuples of them, and scales among a module's public attributes.

    Example:
        >>> numbers_of(nn.Linear(2, 3))
        {'in_features': 2, 'out_features': 3}
    """
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (_is_value(value) or _is_scale(name, value))
    }


def dtype_of(record: TensorRecord) -> torch.dtype:
    """Return the type that a record names."""
    dtype = getattr(torch, record.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"Expected the name of a dtype in the manifest, got {record.dtype!r}.")
    return dtype


def _lines(entries: Mapping[str, Any]) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    return "{\n" + ",\n".join(lines) + "\n}" if lines else "{}"


def _mapping(content: Mapping[str, Any], key: str, read: Callable[[Any], Any]) -> dict[str, Any]:
    entries = content.get(key)
    if not isinstance(entries, dict):
        raise ArgumentError(f"Expected `{key}` in the manifest to be an object, got {entries!r}.")
    return {name: read(entry) for name, entry in entries.items()}


def _record(entry: Any) -> TensorRecord:
    if isinstance(entry, dict) and isinstance(entry.get("dtype"), str):
        shape = entry.get("shape")
        if isinstance(shape, list) and _is_value(tuple(shape)) and min(shape, default=0) >= 0:
            return TensorRecord(tuple(shape), entry["dtype"])
    raise ArgumentError(f"Expected shape and dtype of a tensor in the manifest, got {entry!r}.")


def _text(entry: Any) -> str | None:
    if entry is not None and not isinstance(entry, str):
        raise ArgumentError(f"Expected a checksum in the manifest, got {entry!r}.")
    return entry


def _name(entry: Any) -> str:
    if not isinstance(entry, str):
        raise ArgumentError(f"Expected the name of a tensor in the manifest, got {entry!r}.")
    return entry


def _values(entry: Any) -> dict[str, Value]:
    pairs = entry.items() if isinstance(entry, dict) else [("", entry)]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in pairs}
    known = all(_is_value(value) or _is_scale(name, value) for name, value in values.items())
    if not isinstance(entry, dict) or not known:
        raise ArgumentError(
            "Expected whole numbers, and floating point ones for scales, for attributes in the "
            f"manifest, got {entry!r}."
        )
    return values


def _is_scale(name: str, value: Any) -> bool:
    """Whether it is a scale of attention, which depends on the dimensions of heads."""
    return name in SCALES and type(value) is float and math.isfinite(value)


def _is_value(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_value(part) and not isinstance(part, tuple) for part in value)
    return type(value) is int
