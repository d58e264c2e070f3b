"""ResNet-20 for CIFAR-10 with 1x1 convolution shortcuts, and the data it is pruned on."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride != 1:
            shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, c, h, w]`` to ``[n, width, h/stride, w/stride]``."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.downsample(x))


class ResNet20(nn.Module):
    """Three stages of three blocks; 272 k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, 10]`` of images ``[n, 3, 32, 32]``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))

    def prunable(self) -> list[tuple[nn.Module, str]]:
        """The 3x3 convolutions of the stages, 267 264 weights, as in the WoodFisher sweep."""
        blocks = [block for layer in (self.layer1, self.layer2, self.layer3) for block in layer]
        return [(conv, "weight") for b in blocks for conv in (b.conv1, b.conv2)]  # type: ignore[misc]


def load_resnet20(path: Path) -> ResNet20:
    """The checkpoint in a safetensors file."""
    model = ResNet20()
    model.load_state_dict(load_file(path))
    return model.eval()


def load_cifar10(shared: Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images ``[n, 3, 32, 32]``, normalised, and labels ``[n]`` of the JPEG copies."""
    import pyarrow.parquet as parquet
    from torchvision.io import ImageReadMode, decode_image

    file = next((shared / "cifar10-jpeg").glob(f"{split}-*.parquet"))
    table = parquet.read_table(file)
    if limit is not None:
        table = table.slice(0, limit)
    raw = [io.BytesIO(image["bytes"]).getbuffer() for image in table["img"].to_pylist()]
    decoded = [
        decode_image(torch.frombuffer(bytearray(b), dtype=torch.uint8), ImageReadMode.RGB)
        for b in raw
    ]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (_MEAN, _STD))
    images = torch.stack(decoded).float().div_(255).sub_(mean).div_(std)
    return images, torch.tensor(table["label"].to_pylist())
