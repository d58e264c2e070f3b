"""Models and data by their names in a shell."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_safetensors
from torch import nn

from torchprune_bayes._extras import optional
from torchprune_bayes.cli._text import TextOptions, is_text, text_batches
from torchprune_bayes.cli.digits import CalibrationDigits, load_digits
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError

_IMAGENET_SIZE = 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NESTED = ("state_dict", "model")


@dataclass(frozen=True)
class Data:
    """Batches for pruning and batches for measuring."""

    calibration: Iterable[Any]
    evaluation: Iterable[Any]
    evaluated_on: str


def load_model(
    source: str,
    *,
    checkpoint: Path | None,
    random_init: bool,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make the model named by ``source`` and load a checkpoint into it.

    Args:
        source: ``timm:NAME``, ``hf:NAME_OR_FOLDER`` or ``module:callable``.
        checkpoint: Weights to load, ``.safetensors`` or a file of ``torch.save`` that holds
            only tensors.
        random_init: Whether timm and Hugging Face models keep their random weights.
        options: Arguments for building the model.

    Raises:
        ArgumentError: If there is no such model, or the checkpoint does not fit.
        ArgumentTypeError: If the callable returns no module.
        MissingExtraError: If timm or transformers is not installed.
    """
    scheme, _, name = source.partition(":")
    published, options = checkpoint is None and not random_init, dict(options or {})
    if scheme == "timm":
        model = _timm_model(name, published, options)
    elif scheme == "hf":
        model = _hf_model(name, published, options)
    else:
        model = _called(source, options)
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"Expected `{source}` to return a torch.nn.Module, got {type(model).__name__}."
        )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def load_data(
    source: str,
    evaluation: str | None,
    model: nn.Module,
    *,
    batch_size: int,
    num_samples: int | None,
    text: TextOptions | None = None,
) -> Data:
    """Make the batches named by ``source``.

    Args:
        source: ``digits``, a folder of images with one folder per class, a file of texts,
            ``hf:NAME`` of the Hub, or ``module:callable``.
        evaluation: Source of the batches to measure with; default the test images for
            ``digits``, otherwise ``source``.
        model: Determines the preprocessing of images.
        batch_size: Images per batch.
        num_samples: Calibration samples; the held-out images of ``digits`` follow them.
        text: Columns and sizes of texts.

    Raises:
        ArgumentError: If there is no such data.
        MissingExtraError: If scikit-learn or torchvision is not installed.
    """
    if source == "digits":
        calibration: Iterable[Any] = _calibration_digits(num_samples)
    else:
        calibration = _batches(source, model, batch_size, text)
    if evaluation is None and source != "digits":
        return Data(calibration, calibration, f"{source} (the calibration data)")
    measured = source if evaluation is None else evaluation
    name = "the test images of digits" if measured == "digits" else measured
    return Data(calibration, _batches(measured, model, batch_size, text), name)


def _batches(
    source: str, model: nn.Module, batch_size: int, text: TextOptions | None
) -> Iterable[Any]:
    if source == "digits":
        return load_digits().test.batches(batch_size)
    if Path(source).is_dir():
        return _image_folder(Path(source), model, batch_size)
    if is_text(source):
        return text_batches(source, model, text or TextOptions(batch_size=batch_size))
    batches = _called(source)
    if not isinstance(batches, Iterable):
        raise ArgumentTypeError(
            f"Expected `{source}` to return an iterable of batches, got {type(batches).__name__}."
        )
    return list(batches) if isinstance(batches, Iterator) else batches


def _calibration_digits(num_samples: int | None) -> CalibrationDigits:
    digits = load_digits()
    available = len(digits.train)
    count = available if num_samples is None else num_samples
    if count > available:
        raise ArgumentError(f"Expected at most {available} samples of the digits, got {count}.")
    return CalibrationDigits(digits, count)


def _called(source: str, options: Mapping[str, Any] | None = None) -> Any:
    module, _, name = source.partition(":")
    if not name:
        raise ArgumentError(f"Expected `module:callable`, got {source!r}, which is not a folder.")
    with _importable_from_here():
        try:
            target: Any = import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError) as error:
            raise ArgumentError(f"Expected `{source}` to be importable, got: {error}.") from error
        if not isinstance(target, Callable):  # type: ignore[arg-type]
            raise ArgumentTypeError(
                f"Expected `{source}` to be callable, got {type(target).__name__}."
            )
        return target(**(options or {}))


@contextmanager
def _importable_from_here() -> Iterator[None]:
    # A console script, unlike `python -m`, does not search the working folder.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _timm_model(name: str, published: bool, options: dict[str, Any]) -> Any:
    with optional("timm", "timm"):
        import timm
    try:
        return timm.create_model(name, pretrained=published, **options)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"Expected a model of timm, got: {_first_line(error)}") from error
    except (OSError, ValueError) as error:  # the weights could not be loaded
        raise ArgumentError(
            f"Expected the published weights of `{name}`, got: {_first_line(error)} Pass your own "
            "weights with --checkpoint, or use --random-init."
        ) from error


def _hf_model(name: str, published: bool, options: dict[str, Any]) -> Any:
    with optional("transformers", "hf"):
        import transformers
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        architecture = (config.architectures or [None])[0]
        kind = getattr(transformers, architecture or "AutoModel")
        return kind.from_pretrained(name, config=config) if published else kind._from_config(config)
    except (OSError, ValueError, AttributeError) as error:
        raise ArgumentError(f"Expected a Hugging Face model, got: {_first_line(error)}") from error


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load weights into a model.

    Raises:
        ArgumentError: If the file does not hold the weights of the model.
    """
    try:
        if path.suffix == ".safetensors":
            load_safetensors(model, path)
        else:
            model.load_state_dict(_state_dict(path))
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ArgumentError(
            f"Expected `{path}` to hold the weights of {type(model).__name__}, got: {error}"
        ) from error


def _state_dict(path: Path) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise RuntimeError(f"{type(content).__name__}, not a dictionary of tensors")
    return content


def _image_folder(folder: Path, model: nn.Module, batch_size: int) -> Iterable[Any]:
    with optional("torchvision", "timm"):
        from torchvision.datasets import ImageFolder
    try:
        images = ImageFolder(folder, _image_transform(model))
    except FileNotFoundError as error:
        raise ArgumentError(f"Expected a folder per class, got: {error}") from error
    _check_classes(len(images.classes), model)
    # Shuffled, because the images of a folder are sorted by class.
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(images, batch_size, shuffle=True, generator=generator)


def _check_classes(folders: int, model: nn.Module) -> None:
    """Refuse a folder whose classes cannot be the model's: all metrics would be meaningless."""
    config = getattr(model, "config", None)
    classes = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
    if isinstance(classes, int) and classes != folders:
        raise ArgumentError(
            f"Expected a folder for each of the {classes} classes of {type(model).__name__}, got "
            f"{folders} folders: use a model that was trained for them, such as one of timm with "
            f"--model-options.num_classes {folders} and --checkpoint."
        )


def _image_transform(model: nn.Module) -> Any:
    if hasattr(model, "pretrained_cfg"):
        with optional("timm", "timm"):
            from timm.data import create_transform

            from torchprune_bayes.integrations.timm import WithChannels, data_config
        config = data_config(model)
        transform: Any = create_transform(**config, is_training=False)
        return WithChannels(transform, config["input_size"][0])
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(_IMAGENET_SIZE * 8 // 7),
            transforms.CenterCrop(_IMAGENET_SIZE),
            transforms.ToTensor(),
            transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD),
        ]
    )


def normalisation_of(source: str, model: nn.Module) -> dict[str, Any]:
    """Mean and standard deviation of the channels, with which images of ``source`` were normalised.

    Empty for data that are not normalised here: ``digits``, and batches of a callable.
    """
    if not Path(source).is_dir():
        return {}
    if hasattr(model, "pretrained_cfg"):
        from torchprune_bayes.integrations.timm import data_config

        config = data_config(model)
        return {"mean": config["mean"], "std": config["std"]}
    return {"mean": _IMAGENET_MEAN, "std": _IMAGENET_STD}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
