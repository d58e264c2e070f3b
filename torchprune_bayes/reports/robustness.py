"""Accuracy under adversarial attacks, of several models; the attacks are foolbox's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import nan
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice, check_count
from torchprune_bayes._extras import optional
from torchprune_bayes.calibration.functional import preserved
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.reports.evaluation import logits_of
from torchprune_bayes.reports.plots import (
    checked_path,
    draw_legend,
    draw_series,
    new_figure,
    save_figure,
)
from torchprune_bayes.reports.tables import ResultsTable

ATTACKS = {
    "fgsm": "LinfFastGradientAttack",
    "pgd": "LinfProjectedGradientDescentAttack",
    "deepfool": "LinfDeepFoolAttack",
    "l2-fgm": "L2FastGradientAttack",
    "l2-pgd": "L2ProjectedGradientDescentAttack",
    "l2-deepfool": "L2DeepFoolAttack",
    "carlini-wagner": "L2CarliniWagnerAttack",
    "noise": "L2RepeatedAdditiveGaussianNoiseAttack",
}
"""Names of attacks and the classes of foolbox behind them."""

_TOLERANCE = 1e-3  # by which rounding in a normalisation may exceed the bounds


def evaluate_attacked(
    models: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    attack: str = "pgd",
    epsilons: Sequence[float] = (0.01, 0.03, 0.1),
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_samples: int = 256,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> ResultsTable:
    """Measure accuracy under an attack that sees the model, at several strengths.

    Every model is attacked separately with the same samples and the same random starts, in
    evaluation mode; its gradients, modes and random states are restored. Dense, masked and shrunk
    models are attacked alike. A sample counts as correct if the model is correct without the attack
    and the attack of that strength finds no adversarial example. Pruning for robustness and its
    measurement: Verdenius et al., 2020, arXiv:2006.00896, section 5.5.

    Args:
        models: Models whose output is logits `[B, K]`, or has them as ``.logits``, by name.
        batches: Pairs of images `[B, C, ...]`, floating, and integer labels `[B]`.
        attack: A name in :data:`ATTACKS`: ``fgsm``, ``pgd`` and ``deepfool`` bound the largest
            change of a pixel, the others its Euclidean norm.
        epsilons: Strengths, in units of the pixels.
        bounds: Smallest and largest value of a pixel, before normalisation.
        mean: Value subtracted from each channel; ``None`` for images that are not normalised.
        std: Divisor of each channel.
        num_samples: Samples to attack, the first of the batches.
        seed: Seeds the random starts.
        options: Arguments of the attack's class in foolbox, such as ``{"steps": 100}``.

    Returns:
        A row for each model and strength, 0 (no attack) first: ``model``, ``attack``, ``epsilon``,
        ``accuracy`` and ``samples``.

    Raises:
        ArgumentError: If the attack is unknown, refuses its options, or pixels are out of bounds.
        ArgumentTypeError: If a batch is not a pair of images and labels.
        MissingExtraError: If foolbox is not installed.

    Cost: forward and backward passes over the samples: one for FGSM, 40 for PGD, thousands for
    Carlini-Wagner.

    Example:
        >>> import torch
        >>> images = torch.tensor([[[[0.2]]], [[[0.45]]], [[[0.7]]]])
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        >>> with torch.no_grad():  # class 1 from 0.5 on
        ...     _ = model[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
        ...     _ = model[1].bias.copy_(torch.tensor([0.5, 0.0]))
        >>> batches = [(images, torch.tensor([0, 0, 1]))]
        >>> table = evaluate_attacked({"m": model}, batches, attack="fgsm", epsilons=[0.1, 0.25])
        >>> [(row["epsilon"], round(row["accuracy"], 2)) for row in table]
        [(0.0, 1.0), (0.1, 0.67), (0.25, 0.33)]
    """
    check_choice("attack", attack, tuple(ATTACKS))
    check_count("num_samples", num_samples)
    foolbox = _foolbox()
    try:
        attacker = getattr(foolbox.attacks, ATTACKS[attack])(**(options or {}))
    except TypeError as error:
        raise ArgumentError(f"Expected `options` of {ATTACKS[attack]}, got: {error}.") from error
    parts = list(_first(batches, num_samples))
    scale = _Scale.of(mean, std, parts[0][0])
    pixels = [(_pixels(images, scale, bounds), labels) for images, labels in parts]
    table = ResultsTable()
    for name, model in models.items():
        with _attackable(model, seed) as network:
            device = next(model.parameters()).device
            whole = nn.Sequential(scale.to(device), network)
            whole.training = network.training = False  # not by `eval()`, see `preserved`
            wrapped = foolbox.PyTorchModel(whole, bounds=bounds, device=device)
            right = [
                _right(wrapped, attacker, images.to(device), labels.to(device), epsilons)
                for images, labels in pixels
            ]
        shares = torch.cat(right, dim=1).double().mean(dim=1).tolist()
        samples = sum(len(labels) for _, labels in pixels)
        for epsilon, share in zip([0.0, *epsilons], shares, strict=True):
            table.add(
                model=name, attack=attack, epsilon=float(epsilon), accuracy=share, samples=samples
            )
    return table


def plot_attacked(
    table: ResultsTable, path: str | PathLike[str], *, title: str | None = None
) -> Path:
    """Draw accuracy against the strength of an attack, a line for each model.

    Args:
        table: Rows of :func:`evaluate_attacked`.
        path: File to write, ending in ``.png``, ``.svg`` or ``.pdf``.
        title: Heading, if any.

    Returns:
        The path written.

    Raises:
        ArgumentError: If the suffix is not one of these or there is no row.
        MissingExtraError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> rows = [{"model": "dense", "epsilon": e, "accuracy": 1 - e} for e in (0.0, 0.5)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_attacked(ResultsTable(rows), f"{folder}/attacked.svg").name
        'attacked.svg'
    """
    path, rows = checked_path(path), list(table)
    if not rows:
        raise ArgumentError("Expected rows of `evaluate_attacked` to draw, got none.")
    figure, axes = new_figure("strength of the attack", "accuracy", title)
    series: dict[str, list[tuple[float, float, float]]] = {str(row["model"]): [] for row in rows}
    for row in sorted(rows, key=lambda row: float(row["epsilon"])):
        point = (float(row["epsilon"]), float(row["accuracy"]), nan)
        series[str(row["model"])].append(point)
    entries = draw_series(axes, series.items())
    axes.set_ylim(0, 1.02)
    draw_legend(axes, entries)
    save_figure(figure, path)
    return path


def _foolbox() -> Any:
    with optional("foolbox", "attacks"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of scipy's old names in foolbox 3.3
        import foolbox
    return foolbox


class _Scale(nn.Module):
    """Normalises pixels as the data were."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @classmethod
    def of(
        cls, mean: Sequence[float] | None, std: Sequence[float] | None, images: Tensor
    ) -> _Scale:
        shape = (-1, *[1] * (images.ndim - 2))
        first, second = (
            torch.tensor([default] if channel_values is None else list(channel_values))
            .to(images.dtype)
            .view(shape)
            for channel_values, default in ((mean, 0.0), (std, 1.0))
        )
        for name, values in (("mean", first), ("std", second)):
            if len(values) not in (1, images.shape[1]):
                raise ArgumentError(
                    f"Expected `{name}` of one or {images.shape[1]} channels, got {len(values)}."
                )
        return cls(first, second)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class _Logits(nn.Module):
    """Calls a model and extracts the logits from its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def _first(batches: Iterable[Any], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        pair = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        images, labels = pair if len(pair) == 2 else (None, None)
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise ArgumentTypeError(
                "Expected pairs of floating images and labels to attack, got "
                f"{type(batch).__name__}: attacks change pixels, not texts or tables."
            )
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            raise ArgumentTypeError("Expected one integer label for each image to attack.")
        yield images[:count], labels[:count]
        count -= len(labels)
        if count <= 0:
            return


def _pixels(images: Tensor, scale: _Scale, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    pixels = images * scale.std + scale.mean
    smallest, largest = float(pixels.min()), float(pixels.max())
    slack = _TOLERANCE * (high - low)
    if smallest < low - slack or largest > high + slack:
        raise ArgumentError(
            f"Expected pixels in `bounds` [{low:g}, {high:g}], got values from {smallest:.3g} to "
            f"{largest:.3g}: pass the `mean` and `std` that normalised the images, or their bounds."
        )
    return pixels.clamp(low, high)


@contextmanager
def _attackable(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """Prepare a model for an attack: no parameter gradients, evaluation mode, seeded draws."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(preserved(model))
        torch.manual_seed(seed)
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            yield _Logits(model)
        finally:
            for parameter, flag in zip(model.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)


def _right(
    model: Any, attacker: Any, images: Tensor, labels: Tensor, epsilons: Sequence[float]
) -> Tensor:
    """Which samples remain correct, `[1 + strengths, samples]`; without an attack first."""
    with torch.no_grad():
        clean = model(images).argmax(dim=1) == labels
    _, _, fooled = attacker(model, images, labels, epsilons=list(map(float, epsilons)))
    return torch.cat([clean[None], clean & ~fooled]).cpu()
