"""The small networks of the papers, as functions of input shape, classes and a width multiplier."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


def scaled(widths: Sequence[int], share: float) -> list[int]:
    """Scale widths, each at least one.

    Example:
        >>> scaled([64, 3], 0.25)
        [16, 1]
    """
    return [max(1, round(width * share)) for width in widths]


def mlpnet(shape: Shape, classes: int, width: float = 1.0) -> nn.Sequential:
    """MLPNet: 784-40-20-10 with ReLU and no biases, as in WoodFisher's and CBS's tables."""
    sizes = [prod(shape), *scaled([40, 20], width), classes]
    model = nn.Sequential(nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        if number > 1:
            model.add_module(f"relu{number - 1}", nn.ReLU())
        model.add_module(f"fc{number}", nn.Linear(inputs, outputs, bias=False))
    return model


def perceptron(shape: Shape, classes: int, width: float, *, hidden: Sequence[int]) -> nn.Sequential:
    """Hidden layers with tanh, as in BMRS."""
    layers: list[nn.Module] = [nn.Flatten()]
    sizes = [prod(shape), *scaled(hidden, width)]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def two_layers(shape: Shape, classes: int, width: float) -> nn.Sequential:
    """One hidden layer of 256, SpaM's network for MNIST."""
    [hidden] = scaled([256], width)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(prod(shape), hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


def lenet5(shape: Shape, classes: int, width: float) -> nn.Sequential:
    """LeNet-5 for images of 32 by 32, three times as wide for three channels, as in BMRS."""
    a, b, c, d = scaled([6, 16, 120, 84], width * shape[0])
    side = ((shape[1] - 4) // 2 - 4) // 2
    return nn.Sequential(
        *(nn.Conv2d(shape[0], a, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(a, b, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(b * side * side, c), nn.ReLU(), nn.Linear(c, d), nn.ReLU()),
        nn.Linear(d, classes),
    )


def lenet(shape: Shape, classes: int, width: float) -> nn.Sequential:
    """SpaM's LeNet: 6, 16 and 120 channels and a hidden layer of 84, for images of 28 by 28."""
    a, b, c, d = scaled([6, 16, 120, 84], width)
    return nn.Sequential(
        *(nn.Conv2d(shape[0], a, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(a, b, 3), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(b, c, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(c, d), nn.ReLU(), nn.Linear(d, classes)),
    )


def cifarnet(shape: Shape, classes: int, width: float) -> nn.Sequential:
    """Three convolutions without biases and two linear layers; the widths are those of Caffe's."""
    a, b, c, d = scaled([32, 32, 64, 64], width)
    side = shape[1] // 8
    return nn.Sequential(
        *(nn.Conv2d(shape[0], a, 5, padding=2, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(a, b, 5, padding=2, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(b, c, 5, padding=2, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(c * side * side, d), nn.ReLU(), nn.Linear(d, classes)),
    )


class _Residual(nn.Module):
    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def residual_mlp(shape: Shape, classes: int, width: float) -> nn.Sequential:
    """What SpaM's code calls MLP-Mixer: two residual blocks of 256 units on flat images."""
    size, [hidden] = prod(shape), scaled([256], width)
    blocks = [_Residual(size, hidden) for _ in range(2)]
    return nn.Sequential(nn.Flatten(), *blocks, nn.LayerNorm(size), nn.Linear(size, classes))


VGG_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg16(shape: Shape, classes: int, width: float) -> nn.Sequential:
    """Thirteen convolutions with batch norms, and a linear layer; zeros are max pooling."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for full in VGG_CHANNELS:
        if not full:
            layers.append(nn.MaxPool2d(2))
            continue
        [out] = scaled([full], width)
        layers += [nn.Conv2d(channels, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


_MOBILE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5)
MOBILE_CHANNELS = (*_MOBILE, (1024, 2), (1024, 1))
"""Channels and stride of the separable convolutions of MobileNetV1."""


def depthwise_separable(shape: Shape, classes: int, width: float) -> nn.Sequential:
    """MobileNetV1's chain of convolutions: one per channel, then one per position."""
    [channels] = scaled([32], width)
    layers = _normed(nn.Conv2d(shape[0], channels, 3, 2, 1, bias=False))
    for full, stride in MOBILE_CHANNELS:
        [out] = scaled([full], width)
        layers += _normed(nn.Conv2d(channels, channels, 3, stride, 1, 1, channels, bias=False))
        layers += _normed(nn.Conv2d(channels, out, 1, bias=False))
        channels = out
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def _normed(layer: nn.Conv2d) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()]


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.downsample(x))


class SmallResNet(nn.Module):
    """A residual network for small images: a 3x3 stem and three stages of equal depth."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for stage, out in enumerate(widths[1:], start=1):
            strides = [1 if stage == 1 else 2] + [1] * (depth - 1)
            inputs = [before] + [out] * (depth - 1)
            blocks = [_Block(i, out, s) for i, s in zip(inputs, strides, strict=True)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            before = out
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, classes]`` of images ``[n, channels, height, width]``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)  # type: ignore[operator]
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet20(shape: Shape, classes: int, width: float) -> SmallResNet:
    """ResNet-20 for CIFAR-10 with 1x1 convolutions in the shortcuts; 272 k parameters."""
    return SmallResNet(shape[0], classes, scaled([16, 16, 32, 64], width), depth=3)


def wide_resnet(shape: Shape, classes: int, width: float) -> SmallResNet:
    """A wide residual network, depth 16 and four times as wide, with batch norms."""
    return SmallResNet(shape[0], classes, scaled([16, 64, 128, 256], width), depth=2)
