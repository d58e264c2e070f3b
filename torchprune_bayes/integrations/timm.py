"""Pruning timm's models: calibration on its data sets, averaged weights, checkpoints.

>>> import timm
>>> model = timm.create_model("test_resnet", num_classes=10)
>>> masks = {"conv1.0.weight": model.conv1[0].weight.abs() > 0.05}
>>> average = timm.utils.ModelEmaV3(model)
>>> hold_zeros(average, masks)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset

from torchprune_bayes._extras import optional
from torchprune_bayes._files import read_tensors, reading, save_tensors, write_whole
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.integrations.importances import importance_of, importances_by_name
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured.saving import MANIFEST_FILE, load_shrunk, save_shrunk
from torchprune_bayes.training.keep_sparse import set_zero
from torchprune_bayes.types import Masks, ParameterPairs

with optional("timm", "timm"):
    import timm
    from timm.data import create_transform, resolve_data_config

__all__ = [
    "WithChannels",
    "calibrate",
    "classifier_names",
    "data_config",
    "hold_zeros",
    "importance_of",
    "importances_by_name",
    "load_pruned",
    "save_pruned",
]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of PIL

WEIGHTS_FILE = "model.safetensors"
ARCHITECTURE_FILE = "architecture.json"


def calibrate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    params: ParameterPairs | None = None,
    num_samples: int | None = 1000,
    batch_size: int = 64,
    workers: int = 0,
    data_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Calibration:
    """Calibrate on a data set of ``timm.data.create_dataset``, as the model is evaluated.

    Images are prepared as for evaluation, without augmentation and label mixing, and drawn at
    random: a folder of images is ordered by class.

    Args:
        model: A timm model.
        dataset: Made for this call alone, because its ``transform`` is set: ImageFolder,
            ``torch/...``, ``hfds/...``.
        params: See :class:`~torchprune_bayes.Calibration`.
        num_samples: See :class:`~torchprune_bayes.Calibration`.
        batch_size: Images that are loaded together.
        workers: Processes that load them.
        data_config: What :func:`data_config` or ``timm.data.resolve_data_config`` returns; default
            that of the model.
        options: Further arguments of :class:`~torchprune_bayes.Calibration`; ``loss_fn`` is the
            cross-entropy unless it is given.

    Returns:
        The calibration.
    """
    config = _config_of(model) if data_config is None else data_config
    known = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    chosen = {key: config[key] for key in known if key in config}
    transform: Any = create_transform(**chosen, is_training=False)
    dataset.transform = WithChannels(  # type: ignore[attr-defined]
        transform, config["input_size"][0] if "input_size" in config else 3
    )
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=not isinstance(dataset, IterableDataset),
        num_workers=workers,
    )
    loss_fn = options.pop("loss_fn", cross_entropy)
    return Calibration(model, loader, loss_fn, params=params, num_samples=num_samples, **options)


def data_config(model: nn.Module, *, img_size: int | None = None) -> dict[str, Any]:
    """What ``timm.data.resolve_data_config`` says, for as many channels as the model takes.

    timm gives size, mean and standard deviation of three channels, whatever ``in_chans`` the model
    was built with; for others each is the mean over the three.

    Args:
        model: A timm model.
        img_size: Height and width of the images; default those of the model's published weights.

    Example:
        >>> model = timm.create_model("test_resnet", in_chans=1)
        >>> config = data_config(model, img_size=32)
        >>> config["input_size"], [round(value, 3) for value in config["mean"]]
        ((1, 32, 32), [0.5])
    """
    inner = unwrap(model)
    config: dict[str, Any] = resolve_data_config({"img_size": img_size}, model=inner)
    channels = _channels_of(inner)
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


class WithChannels:
    """A transform of images that first have as many channels as the model takes.

    Grey images become coloured for a model of three channels, and coloured ones grey for one.

    Args:
        transform: What follows.
        channels: 1, 3 or 4; images for other models are left as they are.

    Example:
        >>> from PIL import Image
        >>> WithChannels(lambda image: image.mode, 3)(Image.new("L", (2, 2)))
        'RGB'
    """

    def __init__(self, transform: Callable[[Any], Any], channels: int) -> None:
        self.transform, self.mode = transform, _MODES.get(channels)

    def __call__(self, image: Any) -> Any:
        """Convert and transform an image."""
        if self.mode is not None and getattr(image, "mode", self.mode) != self.mode:
            image = image.convert(self.mode)
        return self.transform(image)


_config_of = data_config  # where a parameter has that name


def _channels_of(model: nn.Module) -> int:
    first = getattr(model, "pretrained_cfg", {}).get("first_conv")
    name = first[0] if isinstance(first, (tuple, list)) else first
    layer = dict(model.named_modules()).get(name) if name else None
    return int(getattr(layer, "in_channels", 3))


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifier's modules, to leave dense with ``prunable_parameters(exclude=...)``.

    Example:
        >>> classifier_names(timm.create_model("test_vit"))
        ['head']
    """
    inner = unwrap(model)
    classifier = inner.get_classifier()  # type: ignore[operator]  # every timm model has it
    heads = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return [name for name, module in inner.named_modules() if any(module is h for h in heads)]


def hold_zeros(average: nn.Module, masks: Masks) -> None:
    """Set the pruned entries of averaged weights to zero; call it whenever something was pruned.

    An average of a weight that was just pruned still holds its past and would let it decay slowly.
    Once zero it stays so, because all that is averaged in from then on is zero.

    Args:
        average: ``timm.utils.ModelEmaV3``, ``torch.optim.swa_utils.AveragedModel`` or the averaged
            model itself.
        masks: Masks by qualified name in the model that is averaged.

    Raises:
        AlignmentError: If a tensor is missing or has another shape.
    """
    inner = unwrap(getattr(average, "module", average))
    tensors = dict(inner.named_parameters())
    for name, mask in masks.items():
        if name not in tensors or tensors[name].shape != mask.shape:
            raise AlignmentError(
                f"Expected averaged weights `{name}` of shape {tuple(mask.shape)}, got "
                f"{tuple(tensors[name].shape) if name in tensors else 'none'}."
            )
    for name, mask in masks.items():
        set_zero(tensors[name].data, ~mask)


def save_pruned(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    architecture: str,
    model_kwargs: Mapping[str, Any] | None = None,
    shrunk: bool = False,
    **facts: Any,
) -> None:
    """Write a model so that timm and :func:`load_pruned` read it.

    ``model.safetensors`` holds plain weights; timm's ``validate.py --checkpoint`` takes it where
    nothing was shrunk. ``architecture.json`` says how to build the model.

    Args:
        model: Without masks; pruned weights are zeros.
        folder: Made if it is not there.
        architecture: What ``timm.create_model`` takes.
        model_kwargs: Further arguments of ``timm.create_model``, such as ``num_classes``.
        shrunk: Whether channels were removed, so that the weights no longer fit the architecture.
        facts: Plain values to note down: method, sparsity, metrics.

    Raises:
        ParameterError: If a shrunk model has masks.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    inner = unwrap(model)
    if shrunk:
        save_shrunk(inner, target)
    else:
        save_tensors(target / WEIGHTS_FILE, inner.state_dict(), {"format": "pt"})
    content = {"architecture": architecture, "model_kwargs": dict(model_kwargs or {}), **facts}
    text = json.dumps(content, indent=2) + "\n"
    write_whole(target / ARCHITECTURE_FILE, lambda draft: draft.write_text(text, encoding="utf-8"))


def load_pruned(folder: str | os.PathLike[str]) -> nn.Module:
    """Build the model that :func:`save_pruned` wrote, shrunk or not, strictly.

    Raises:
        ArgumentError: If the folder holds no such model, or a damaged one.
    """
    source = Path(folder)
    described = source / ARCHITECTURE_FILE
    if not described.is_file():
        raise ArgumentError(f"Expected a file `{ARCHITECTURE_FILE}` in {source}, got none.")
    with reading(described, "the description of a pruned model"):
        content = json.loads(described.read_text(encoding="utf-8"))
        model: nn.Module = timm.create_model(content["architecture"], **content["model_kwargs"])
    if (source / MANIFEST_FILE).is_file():
        return load_shrunk(model, source)
    weights = read_tensors(source / WEIGHTS_FILE, "weights of the model")
    with reading(weights.path, f"weights of {content['architecture']}"):
        model.load_state_dict(dict(weights.tensors))
    return model
