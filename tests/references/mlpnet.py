"""MLPNet on MNIST, the model of the WoodFisher, CBS and CHITA papers' one-shot tables.

``shared`` below is the folder that the fixture ``shared_data`` finds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

_MEAN, _STD = 0.1307, 0.3081


def load_mlpnet(shared: Path) -> nn.Module:
    """The dense checkpoint, 784-40-20-10 with ReLU and no biases; 93.97 % test accuracy."""
    layers = {
        "fc1": nn.Linear(784, 40, bias=False),
        "relu1": nn.ReLU(),
        "fc2": nn.Linear(40, 20, bias=False),
        "relu2": nn.ReLU(),
        "fc3": nn.Linear(20, 10, bias=False),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.load_state_dict(load_file(shared / "checkpoints" / "mlpnet_mnist.safetensors"))
    return model.eval()


def load_mnist(shared: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train inputs and labels, then test ones; inputs are normalised, float32 ``[n, 784]``."""
    raw = shared / "MNIST" / "raw"
    pieces = []
    for split in ("train", "t10k"):
        pixels = _idx(raw / f"{split}-images-idx3-ubyte", header=16).reshape(-1, 784)
        pieces.append(pixels.float().div_(255.0).sub_(_MEAN).div_(_STD))
        pieces.append(_idx(raw / f"{split}-labels-idx1-ubyte", header=8).long())
    train_x, train_y, test_x, test_y = pieces
    return train_x, train_y, test_x, test_y


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, in percent."""
    return 100.0 * float((model(x).argmax(-1) == y).double().mean())


def shuffled_batches(x: Tensor, y: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of 512 in an order that a calibration's seed decides, indexed at once."""
    data = TensorDataset(x, y)
    return DataLoader(data, sampler=BatchSampler(RandomSampler(data), 512, False), batch_size=None)


def _idx(path: Path, header: int) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8, offset=header)
