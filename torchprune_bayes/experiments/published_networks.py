"""The networks of the papers from timm, with random weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchprune_bayes._extras import optional
from torchprune_bayes.experiments.networks import Shape, depthwise_separable, scaled

_HEAD = 64


def resnet18(shape: Shape, classes: int, width: float) -> nn.Module:
    """ResNet-18 with its 7x7 stem, whatever the size of the images, as in SNIP-it and BMRS."""
    return _timm("resnet18", shape, classes, channels=_widths(width))


def resnet50(shape: Shape, classes: int, width: float) -> nn.Module:
    """ResNet-50."""
    return _timm("resnet50", shape, classes, channels=_widths(width))


def mobilenet_v1(shape: Shape, classes: int, width: float) -> nn.Module:
    """MobileNetV1; narrower ones are built here, as timm has none."""
    if width < 1:
        return depthwise_separable(shape, classes, width)
    return _timm("mobilenetv1_100", shape, classes)


def vit_base(shape: Shape, classes: int, width: float) -> nn.Module:
    """ViT-B/16; narrower ones have fewer heads."""
    [heads] = scaled([12], width)
    options = {"img_size": shape[-1], "num_heads": heads, "embed_dim": heads * _HEAD}
    return _timm("vit_base_patch16_224", shape, classes, **options)


def vit_small_images(
    shape: Shape, classes: int, width: float, *, patch: int, size: int, depth: int
) -> nn.Module:
    """A ViT for images too small for patches of 16."""
    heads = max(1, round(size * width / _HEAD))
    options = {"img_size": shape[-1], "patch_size": patch, "depth": depth}
    options |= {"num_heads": heads, "embed_dim": heads * _HEAD}
    return _timm("vit_tiny_patch16_224", shape, classes, **options)


def _widths(share: float) -> list[int]:
    return scaled([64, 128, 256, 512], share)


def _timm(name: str, shape: Shape, classes: int, **options: Any) -> nn.Module:
    with optional("timm", "timm"):
        import timm
    model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=shape[0], **options)
    return model
