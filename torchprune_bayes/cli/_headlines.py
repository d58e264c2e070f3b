"""Published numbers, and the settings that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A method with the options of a paper.

    Attributes:
        label: What the table calls it.
        method: A registered method.
        published: Test accuracy in percent at each sparsity, as printed in the paper.
        samples: Gradients of single samples at full scale; 0 for methods without data.
        options: Options of the method.
    """

    label: str
    method: str
    published: Mapping[float, float]
    samples: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Headline:
    """A table of a paper: one network, pruned at once by several methods, not fine-tuned.

    Attributes:
        title: What the table is about.
        paper: Where it was published.
        dense: Accuracy of the published network in percent.
        epochs: Epochs to train a network of one's own for at full scale.
        settings: The rows.
        differs: Where the original, or what is done here, differs from the description.
    """

    title: str
    paper: str
    dense: float
    epochs: int
    settings: tuple[Setting, ...]
    differs: str


_MAGNITUDE = Setting("magnitude", "magnitude", {0.9: 90.30, 0.95: 83.64, 0.98: 32.25})
_PAPER = {"block_size": "tensor", "damping": 1e-5, "update": "single", "update_scale": 1.0}
_FULL = {"block_size": "full", "damping": 1e-3}

HEADLINES = {
    "woodfisher-mlpnet": Headline(
        "WoodFisher, MLPNet on MNIST, pruned at once",
        "arXiv:2004.14340",
        dense=93.97,
        epochs=25,
        settings=(
            _MAGNITUDE,
            Setting("woodfisher", "woodfisher", {0.8: 93.20, 0.9: 90.88, 0.95: 84.18}, 100, _PAPER),
            Setting("kfac", "kfac", {0.95: 81.26}, 100, {"damping": 1e-5, "pi": False}),
            Setting(
                "diagonal-fisher, per layer",
                "diagonal-fisher",
                {0.95: 19.88},
                4096,
                {"scope": "layer"},
            ),
        ),
        differs=(
            "The original's diagonal Fisher ranks within each layer whatever is asked; over all "
            "layers, the default here, it does much better."
        ),
    ),
    "cbs-mlpnet": Headline(
        "Combinatorial Brain Surgeon, MLPNet on MNIST, pruned at once",
        "arXiv:2203.04466",
        dense=93.97,
        epochs=25,
        settings=(
            _MAGNITUDE,
            Setting(
                "woodfisher",
                "woodfisher",
                {0.9: 91.69, 0.95: 85.54, 0.98: 38.26},
                10000,
                {**_FULL, "update": "single", "update_scale": 1.0},
            ),
            Setting(
                "cbs, selection alone",
                "cbs",
                {0.9: 92.37, 0.95: 88.24, 0.98: 66.64},
                10000,
                {**_FULL, "update": "none"},
            ),
            Setting("cbs", "cbs", {0.9: 93.14, 0.95: 88.92, 0.98: 55.45}, 10000, _FULL),
        ),
        differs=(
            "The original's starts keep up to 10 % more weights than asked, 2.2 instead of 2 % at "
            "a sparsity of 0.98; here the sparsity is exact."
        ),
    ),
}
"""Tables that can be repeated, by name."""
