"""Prune a digit classifier to 90 % with PyTorch's own function and the WoodFisher criterion."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes import Calibration, WoodFisher, bake, prunable_parameters

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
train, test = TensorDataset(x[:1400], y[:1400]), (x[1400:], y[1400:])
loader = DataLoader(train, batch_size=64, shuffle=True)
loss_fn = nn.CrossEntropyLoss()


def train_model() -> nn.Module:
    """Train a small multilayer perceptron."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module) -> float:
    """Share of right answers on the test images."""
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


model = train_model()
print(f"dense:      {accuracy(model):.3f}")

params = prunable_parameters(model)
calibration = Calibration(model, loader, loss_fn, params=params, num_samples=1000)
prune.global_unstructured(params, pruning_method=WoodFisher, amount=0.9, calibration=calibration)
print(f"WoodFisher: {accuracy(model):.3f} with 90 % of the weights removed, not fine-tuned")

bake(model)  # plain weights again: no masks, no hooks
zeros = sum(int((module.weight == 0).sum()) for module, _ in params)
total = sum(module.weight.numel() for module, _ in params)
assert zeros == round(0.9 * total)
assert accuracy(model) > 0.7
