"""Small networks, one for each way in which channels can be wired, with statistics off their start.

All take images ``[n, 3, 16, 16]`` and give logits ``[n, 5]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A block with a projection where the width or the resolution changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            projection = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class Inverted(nn.Module):
    """Expand, filter each channel, squeeze and excite, project, with a layer scale."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.PReLU(inner)
        )
        self.squeeze = nn.Conv2d(inner, 3, 1)
        self.excite = nn.Conv2d(3, inner, 1)
        self.project = nn.Conv2d(inner, width, 1)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.scale * self.project(y * gate)


class Dense(nn.Module):
    """Every layer reads what all layers before it made, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.one = nn.Conv2d(6, 4, 3, 1, 1)
        self.two = nn.Conv2d(10, 4, 3, 1, 1)
        self.norm = nn.BatchNorm2d(14)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([x, torch.relu(self.one(x))], 1)
        x = torch.cat([x, torch.relu(self.two(x))], 1)
        return self.head(self.norm(x).mean((2, 3)))


def small_resnet() -> nn.Module:
    """Two stages, the first of them on the stem's channels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8, 8, 1),
        Residual(8, 12, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def small_vgg() -> nn.Module:
    """A chain in which a linear layer reads flattened maps, 16 entries for each channel."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, 1),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )


def small_depthwise() -> nn.Module:
    """An inverted residual block with squeeze and excitation."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        Inverted(6, 10),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def small_group_norm() -> nn.Module:
    """A norm over two channels each, and one over four."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        nn.Conv2d(8, 12, 3, 2, 1),
        nn.GroupNorm(3, 12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def small_transposed() -> nn.Module:
    """A transposed convolution between two others, and a norm without parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 8, 2, 2),
        nn.InstanceNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet": small_resnet,
    "vgg": small_vgg,
    "depthwise": small_depthwise,
    "dense": Dense,
    "group norm": small_group_norm,
    "transposed": small_transposed,
}


def torchvision_model(name: str) -> nn.Module:
    """A published architecture of torchvision."""
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def timm_model(name: str) -> nn.Module:
    """A published architecture of timm."""
    import timm

    return timm.create_model(name, pretrained=False)


def unsettled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move norms, their statistics, scales and biases off their starting values.

    At these, a norm is the identity and a layer scale hides its block, and with them most mistakes.
    Convolutions get He's scale, so that activations keep their size through many layers.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False)]:
                noise = torch.randn(tensor.shape, generator=generator)
                if isinstance(module, nn.Conv2d | nn.Linear) and name == "weight":
                    tensor.copy_(noise * (2.0 / tensor[0].numel()) ** 0.5)
                elif name == "bias":
                    tensor.copy_(0.1 * noise)
                elif tensor.dim() == 1 or name in ("scale", "gamma"):
                    tensor.copy_(1.0 + 0.2 * noise)
            for name, buffer in [*module.named_buffers(recurse=False)]:
                if name == "running_mean":
                    buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
                if name == "running_var":
                    buffer.copy_(1.0 + torch.rand(buffer.shape, generator=generator))
    return model


def images(count: int = 2, size: int = 16, seed: int = 1) -> Tensor:
    """Random images ``[count, 3, size, size]``."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def build(name: str, seed: int = 0) -> nn.Module:
    """A small network by name, in evaluation mode; the global generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return unsettled(SMALL[name](), seed).eval()
