"""Saving a shrunk model and building it again from its original constructor or config.

In plain words: a shrunk model no longer fits the constructor or config it came from. The folder
holds its tensors as safetensors and a small JSON manifest with their sizes and the numbers on
modules that changed. To load, build the original model and pass it: its tensors are replaced
by those of the file and the numbers are set. Nothing is pickled, and a folder written by
``save_pretrained`` can hold both files as well, since their names are their own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from torchprune_bayes._files import (
    check_writable,
    read_tensors,
    reading,
    save_tensors,
    write_whole,
    writing,
)
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured._manifest import (
    Manifest,
    TensorRecord,
    Value,
    dtype_of,
    numbers_of,
)
from torchprune_bayes.structured._replacement import as_it_was_on_error
from torchprune_bayes.wiring.tensors import all_tensors

TENSORS_FILE = "shrunk.safetensors"
MANIFEST_FILE = "shrunk.json"
_DRAFT = ".part"


def save_shrunk(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a shrunk model as ``shrunk.safetensors`` and ``shrunk.json``.

    Recorded are all parameters and buffers that belong to the state, ties once, and for every
    module that owns tensors or has some below it the whole numbers among its attributes, such as
    ``out_features`` or ``num_heads``, and the scales of attention. The model, its config included,
    is not changed.

    Args:
        model: The shrunk model; wrappers are looked through.
        folder: Created if it does not exist; other files in it are kept. A process that is killed
            at any moment leaves a folder that loads, the older model or this one.

    Raises:
        ArgumentError: If the folder cannot be written.
        ParameterError: If a module is pruned with a mask or keeps state that is not a tensor.

    Cost: one copy of the tensors that are not contiguous or overlap others; the file is read once
    for its checksum.

    Example:
        >>> import tempfile
        >>> small = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_shrunk(small, folder)
        ...     _ = load_shrunk(model, folder)
        >>> model[0].out_features, bool((model[2].weight == small[2].weight).all())
        (2, True)
    """
    model = unwrap(model)
    _check_savable(model)
    manifest, tensors = _describe(model)
    target = Path(folder)
    check_writable(target)
    drafts = [target / f"{name}{_DRAFT}" for name in (TENSORS_FILE, MANIFEST_FILE)]
    with writing(target):
        save_tensors(drafts[0], tensors, {"format": "pt"})
        manifest = replace(manifest, sha256=_checksum(drafts[0], manifest))
        text = manifest.to_json()
        write_whole(drafts[1], lambda path: path.write_text(text, encoding="utf-8"))
        # Between the two the new manifest is the draft, which the loader knows by the checksum.
        os.replace(drafts[0], target / TENSORS_FILE)
        os.replace(drafts[1], target / MANIFEST_FILE)


def load_shrunk(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Turn a newly built model into the shrunk one that was saved.

    Args:
        model: Built as the original was, before it was shrunk; changed in place. Its devices,
            modes and ``requires_grad`` are kept. Build optimizers afterwards.
        folder: Where :func:`save_shrunk` wrote.

    Returns:
        The same model, with the saved tensors bit for bit.

    Raises:
        ArgumentError: If a file is missing, damaged, or does not belong to the other or to the
            model. The model is then as it was.

    Cost: the saved tensors are held beside the model's own until all checks have passed; the file
    is read once more for its checksum.
    """
    inner = unwrap(model)
    source = Path(folder)
    manifest = _manifest_in(source)
    tensors = read_tensors(source / TENSORS_FILE, "a safetensors file").tensors
    _check_file(manifest, tensors)
    _check_tensors(inner, manifest)
    _check_attributes(inner, manifest)
    if manifest.sha256 is not None and not _belongs(manifest, source):
        raise ArgumentError(
            f"Expected `{TENSORS_FILE}` and `{MANIFEST_FILE}` in {source} as they were written, "
            "got another checksum: they are damaged or were edited; save the model again."
        )
    with as_it_was_on_error([inner]):
        _replace(inner, manifest, tensors)
        for name, values in manifest.attributes.items():
            module = inner.get_submodule(name)
            for attribute, value in values.items():
                if getattr(module, attribute) != value:
                    setattr(module, attribute, value)
        for module in inner.modules():
            own = dict(module.named_parameters(recurse=False))
            kind = kind_of(module).class_for(module, own)
            if kind is not type(module):
                module.__class__ = kind
        return model


def _check_savable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(
            key.endswith("_mask") and f"{key[:-5]}_orig" in module._parameters
            for key in module._buffers
        ):
            raise ParameterError(
                f"Expected a model without masks, got a pruned `{name}`; make it permanent first."
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ParameterError(
                f"Expected a model whose state is tensors only, got extra state in `{name}`."
            )


def _describe(model: nn.Module) -> tuple[Manifest, dict[str, Tensor]]:
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor, belongs in all_tensors(model):
        if not belongs:
            continue
        if id(tensor) in names:
            aliases[name] = names[id(tensor)]
            continue
        names[id(tensor)] = name
        stored = tensor.detach().contiguous()
        address = stored.untyped_storage().data_ptr()
        tensors[name] = stored.clone() if address in memory else stored
        memory.add(address)
    records = {name: TensorRecord.of(tensor) for name, tensor in tensors.items()}
    numbers = {name: numbers_of(module) for name, module in model.named_modules()}
    return Manifest(
        records, aliases, {name: result for name, result in numbers.items() if result}
    ), tensors


def _checksum(path: Path, manifest: Manifest) -> str:
    """SHA-256 of what a manifest says and of the file of tensors."""
    digest = hashlib.sha256(replace(manifest, sha256=None).to_json().encode())
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _belongs(manifest: Manifest, folder: Path) -> bool:
    with reading(folder / TENSORS_FILE, "tensors"):
        return manifest.sha256 == _checksum(folder / TENSORS_FILE, manifest)


def _manifest_in(folder: Path) -> Manifest:
    """The manifest that the folder's tensors go with, which may be a finished draft."""
    if not (folder / TENSORS_FILE).is_file():
        raise ArgumentError(
            f"Expected a file `{TENSORS_FILE}` in {folder}, got none: save_shrunk writes it."
        )
    draft = folder / f"{MANIFEST_FILE}{_DRAFT}"
    if draft.is_file():
        with suppress(ArgumentError):
            result = _read_manifest(draft)
            if _belongs(result, folder):
                return result
    if not (folder / MANIFEST_FILE).is_file():
        raise ArgumentError(
            f"Expected a file `{MANIFEST_FILE}` in {folder}, got none: save_shrunk writes it."
        )
    return _read_manifest(folder / MANIFEST_FILE)


def _read_manifest(path: Path) -> Manifest:
    with reading(path, "a manifest"):
        return Manifest.from_json(path.read_text(encoding="utf-8"))


def _check_file(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    if tensors.keys() != manifest.tensors.keys():
        some = sorted(tensors.keys() ^ manifest.tensors.keys())[:3]
        raise ArgumentError(
            f"Expected the manifest to list the file's tensors, got differences at {some}."
        )
    for name, record in manifest.tensors.items():
        result = TensorRecord.of(tensors[name])
        if result.shape != record.shape or tensors[name].dtype != dtype_of(record):
            raise ArgumentError(f"Expected `{name}` of {record} in the file, got {result}.")
    for name, stored in manifest.aliases.items():
        if stored not in manifest.tensors or name in manifest.tensors:
            raise ArgumentError(f"Expected `{name}` to be tied to a stored tensor, got {stored!r}.")


def _check_tensors(model: nn.Module, manifest: Manifest) -> None:
    present = {name: (tensor, belongs) for name, tensor, belongs in all_tensors(model)}
    needed = {name for name, (_, belongs) in present.items() if belongs}
    given = manifest.tensors.keys() | manifest.aliases.keys()
    if needed != given:
        raise ArgumentError(
            "Expected a model built as the saved one was, got one with "
            f"{len(needed - given)} tensors more and {len(given - needed)} fewer, such as "
            f"{sorted(needed ^ given)[:3]}."
        )
    for name in given:
        record = manifest.tensors[manifest.aliases.get(name, name)]
        if present[name][0].dim() != len(record.shape):
            raise ArgumentError(
                f"Expected `{name}` with {len(record.shape)} dimensions as it was saved, got shape "
                f"{tuple(present[name][0].shape)}."
            )
        if present[name][0].is_floating_point() != dtype_of(record).is_floating_point:
            raise ArgumentError(
                f"Expected `{name}` of a type like the model's {present[name][0].dtype}, got "
                f"{record.dtype}."
            )


def _check_attributes(model: nn.Module, manifest: Manifest) -> None:
    modules = dict(model.named_modules())
    for name, values in manifest.attributes.items():
        if name not in modules:
            raise ArgumentError(f"Expected a module `{name}` as in the saved model, got none.")
        present = numbers_of(modules[name])
        for attribute, value in values.items():
            if vars(modules[name]).get(attribute, value) is None:
                continue  # set by a run
            if not _same_kind(present.get(attribute), value):
                place = f"{name}.{attribute}".lstrip(".")
                raise ArgumentError(
                    f"Expected `{place}` to be a number like {value}, got "
                    f"{getattr(modules[name], attribute, None)!r}."
                )


def _same_kind(present: Value | None, value: Value) -> bool:
    if isinstance(present, tuple) and isinstance(value, tuple):
        return len(present) == len(value)
    return type(present) is type(value)


def _replace(model: nn.Module, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    built: dict[str, Tensor] = {}
    for name, present, belongs in list(all_tensors(model)):
        if not belongs:
            continue
        stored = manifest.aliases.get(name, name)
        if stored not in built:
            value = tensors[stored].to(present.device, copy=True)  # not tied to the mapped file
            trained = isinstance(present, nn.Parameter)
            built[stored] = nn.Parameter(value, present.requires_grad) if trained else value
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, built[stored])
